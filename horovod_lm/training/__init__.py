"""Training: the loop, the optimizer, checkpoints, evaluation, elastic training, run files."""
