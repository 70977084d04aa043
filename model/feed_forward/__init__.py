"""Feed-forward layers, a file each. One is made from the decoder's config and maps [..., C] to [..., C].

Its matrix `down` writes to the residual stream, and is drawn smaller for it.
"""

from sinkbed.registry import Registry

FEED_FORWARDS = Registry("model.decoder.feed_forward", __name__)
