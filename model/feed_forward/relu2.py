"""Squared ReLU (Primer, arXiv 2109.08668)."""

from torch import Tensor

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.layers import FeedForward


@FEED_FORWARDS.register("relu2")
class ReLU2(FeedForward):
    """down(relu(up(x))²)."""

    def activate(self, x: Tensor) -> Tensor:
        return x.relu().square()
