"""Sinkbed: a from-scratch pretraining testbed for attention sinks.

The folders of the checkout are its packages: `data/` is `sinkbed.data`, and so on. This one holds what stands above
them: the version, and `python -m sinkbed`.
"""
