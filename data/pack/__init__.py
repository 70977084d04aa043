"""Packing: which pieces of which documents stand in a row, and batches of such rows in a reproducible order."""
