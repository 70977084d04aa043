"""A run on disk: its files, checkpoints, record of points, and W&B."""
