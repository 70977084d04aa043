"""Parts that attention may have besides its projections, a file each: gates, norms of heads, biases.

`model.decoder.attention_parts` lists them, and they act in the order of the list. In names: B rows, T positions,
H query heads, Hkv key heads, D head dim, C width of the residual stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkbed.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION_PARTS = Registry("model.decoder.attention_parts", __name__)


class AttentionPart:
    """What a part may do; by itself it does nothing. One that has weights is an `nn.Module` too.

    It is made from the decoder's config and the number of the layer, from 0.
    """

    def queries_keys(self, q_k: Tensor) -> Tensor:
        """Queries and keys [B, T, H + Hkv, D] before positions turn them."""
        return q_k

    def values(self, v: Tensor, x: Tensor, left: dict[str, Tensor]) -> Tensor:
        """Values [B, T, Hkv, D]; x [B, T, C] is what attention reads, `left` what earlier layers have left."""
        return v

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """What heads give [B, T, H, D], before it is projected; x as above."""
        return o
