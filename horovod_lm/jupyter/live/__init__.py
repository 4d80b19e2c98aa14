"""`HorovodCluster`: live ranks on ipyparallel engines."""
