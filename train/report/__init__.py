"""What runs found, as tables, figures and pages. Reads run directories only."""
