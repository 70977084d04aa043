"""Norms, a file each. A norm is made from the decoder's config and maps [..., C] to [..., C]."""

from sinkbed.registry import Registry

NORMS = Registry("model.decoder.norm", __name__)
