"""Pre-norm (arXiv 2002.04745): a part reads a normalised stream and writes to the raw one."""

from collections.abc import Callable

from torch import Tensor

from sinkbed.model.block import Block
from sinkbed.model.blocks import BLOCKS


@BLOCKS.register("pre_norm")
class PreNorm(Block):
    """x + part(norm(x))."""

    def join(self, x: Tensor, part: Callable[[Tensor], Tensor], name: str) -> Tensor:
        return x + part(getattr(self, f"{name}_norm")(x))
