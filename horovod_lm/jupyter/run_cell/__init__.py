"""`%%horovodrun`: a cell on N new processes."""
