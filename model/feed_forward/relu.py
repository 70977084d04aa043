"""ReLU: the feed-forward of the first Transformer (arXiv 1706.03762)."""

from torch import Tensor

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.layers import FeedForward


@FEED_FORWARDS.register("relu")
class ReLU(FeedForward):
    """down(relu(up(x)))."""

    def activate(self, x: Tensor) -> Tensor:
        return x.relu()
