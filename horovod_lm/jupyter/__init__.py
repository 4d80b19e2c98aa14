"""What only notebooks need: figures, and executing and checking the notebooks themselves."""
