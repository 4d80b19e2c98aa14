"""Configuration, the door to Horovod, and what a run records."""
