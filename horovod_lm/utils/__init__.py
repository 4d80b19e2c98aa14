"""Configuration, calls of Horovod, the command line, and the machine's resources."""
