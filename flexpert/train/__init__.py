"""Training: data, checkpoints, the loop and its schedule."""
