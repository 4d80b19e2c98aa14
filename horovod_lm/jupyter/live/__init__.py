"""`HorovodCluster`: live ranks, which keep their variables from cell to cell."""
