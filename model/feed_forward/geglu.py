"""GEGLU (arXiv 2002.05202), with the tanh form of GELU, as in Gemma."""

import torch.nn.functional as F
from torch import Tensor

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.layers import GatedFeedForward


@FEED_FORWARDS.register("geglu")
class GEGLU(GatedFeedForward):
    """down(gelu(gate(x)) · up(x))."""

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")
