"""Post-norm, as in the first Transformer (arXiv 1706.03762): the stream itself is normalised after each part."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from sinkbed.model.block import Block
from sinkbed.model.blocks import BLOCKS


@BLOCKS.register("post_norm")
class PostNorm(Block):
    """norm(x + part(x)); the last one is the decoder's final norm."""

    norm_at_end: ClassVar[bool] = False

    def join(self, x: Tensor, part: Callable[[Tensor], Tensor], name: str) -> Tensor:
        return getattr(self, f"{name}_norm")(x + part(x))
