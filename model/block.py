"""What every block has: two parts, attention and feed-forward, each with a norm and a residual connection."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from sinkbed.kernels import Statistics
from sinkbed.model.attention import ForwardPass, SelfAttention
from sinkbed.model.config import DecoderConfig
from sinkbed.model.feed_forward import FEED_FORWARDS
from sinkbed.model.norms import NORMS


class Block(nn.Module):
    """Attention, then the feed-forward; a subclass says how each is joined to the residual stream."""

    norm_at_end: ClassVar[bool] = True
    """Whether the decoder needs a norm after the last block."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = NORMS.make(config.norm, config)
        self.attention = SelfAttention(config, layer)
        self.feed_forward: nn.Module | None = None
        if config.feed_forward != "none":
            self.feed_forward_norm = NORMS.make(config.norm, config)
            self.feed_forward = FEED_FORWARDS.make(config.feed_forward, config)

    def forward(self, x: Tensor, run: ForwardPass) -> tuple[Tensor, Statistics | None]:
        """x [B, T, C] -> [B, T, C], and the statistics [B, H, T] when asked for."""
        measured: Statistics | None = None

        def attend(h: Tensor) -> Tensor:
            nonlocal measured
            h, measured = self.attention(h, run)
            return h

        x = self.join(x, attend, "attention")
        if self.feed_forward is not None:
            x = self.join(x, self.feed_forward, "feed_forward")
        return x, measured

    def join(self, x: Tensor, part: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """The residual stream after a part, whose norm is `{name}_norm`."""
        raise NotImplementedError
