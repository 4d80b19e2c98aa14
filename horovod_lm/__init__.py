"""Build a GPT-style language model and train it on many workers with Horovod.

The package is what the course imports, and it is meant to be read. Importing it is instant:
torch, Horovod and Jupyter are imported by the modules that use them, never here.
"""
