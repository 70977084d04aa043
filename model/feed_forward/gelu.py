"""GELU (arXiv 1606.08415) in the form with a tanh: the feed-forward of GPT-2."""

import torch.nn.functional as F
from torch import Tensor

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.layers import FeedForward


@FEED_FORWARDS.register("gelu")
class GELU(FeedForward):
    """down(gelu(up(x)))."""

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")
