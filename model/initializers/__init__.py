"""Initialisation rules, a file each. A rule is made from the decoder's config.

It gives the standard deviation of the normal distribution that a matrix is drawn from, by name and shape.
"""

from sinkbed.registry import Registry

INITIALIZERS = Registry("model.decoder.init", __name__)

WRITES_RESIDUAL = ("attention.out.weight", "feed_forward.down.weight")
"""How the names of the matrices end that write to the residual stream."""
