"""Where documents come from, which of them are taken, and in which order."""
