"""SiLU (arXiv 1702.03118), without a gate."""

import torch.nn.functional as F
from torch import Tensor

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.layers import FeedForward


@FEED_FORWARDS.register("silu")
class SiLU(FeedForward):
    """down(silu(up(x)))."""

    def activate(self, x: Tensor) -> Tensor:
        return F.silu(x)
