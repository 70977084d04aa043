"""Blocks, a file each: where the norms stand around attention and feed-forward."""

from sinkbed.registry import Registry

BLOCKS = Registry("model.decoder.block", __name__)
