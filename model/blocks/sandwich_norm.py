"""Sandwich norm (arXiv 2105.13290; Gemma 2): what a part reads is normalised, and what it writes."""

from collections.abc import Callable

from torch import Tensor

from sinkbed.model.block import Block
from sinkbed.model.blocks import BLOCKS
from sinkbed.model.config import DecoderConfig
from sinkbed.model.norms import NORMS


@BLOCKS.register("sandwich_norm")
class SandwichNorm(Block):
    """x + norm(part(norm(x))), two norms a part."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_out_norm = NORMS.make(config.norm, config)
        if self.feed_forward is not None:
            self.feed_forward_out_norm = NORMS.make(config.norm, config)

    def join(self, x: Tensor, part: Callable[[Tensor], Tensor], name: str) -> Tensor:
        written = part(getattr(self, f"{name}_norm")(x))
        return x + getattr(self, f"{name}_out_norm")(written)
