"""ReGLU (arXiv 2002.05202)."""

from torch import Tensor

from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.layers import GatedFeedForward


@FEED_FORWARDS.register("reglu")
class ReGLU(GatedFeedForward):
    """down(relu(gate(x)) · up(x))."""

    def activate(self, x: Tensor) -> Tensor:
        return x.relu()
