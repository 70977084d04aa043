"""Training: the Lightning module, its data, the trainer, optimizer and callbacks."""
