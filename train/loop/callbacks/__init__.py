"""What looks at a run while it trains: sinks, states, checkpoints, files."""
