"""No feed-forward: blocks of attention only (arXiv 2603.05498)."""

from sinkbed.model.config import DecoderConfig
from sinkbed.model.feed_forward import FEED_FORWARDS


@FEED_FORWARDS.register("none")
def none(config: DecoderConfig) -> None:
    """Blocks have neither a feed-forward nor its norm; d_ff is 0."""
