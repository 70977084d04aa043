"""Position encodings, a file each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkbed.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = Registry("model.decoder.position", __name__)


class PositionEncoding:
    """What a position encoding may do; by itself it does nothing. One that has weights is an `nn.Module` too.

    It is made from the decoder's config. Positions are [B, T], or [T] where all rows have the same; they count along
    the row, or along each document with `strategy.positions: document`.
    """

    max_length: int | None = None
    """Positions that there are; None: any number."""

    @property
    def slopes(self) -> Tensor | None:
        """[H], of a bias −slope · (i − j) on the logit of query i and key j.

        Distances are those in the row, which within a document are those in the document.
        """
        return None

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """What the first block is given of the embedded tokens x [B, T, C]."""
        return x

    def prepare(self, positions: Tensor) -> Any:
        """What `rotate` needs, once a forward pass."""
        return None

    def rotate(self, x: Tensor, prepared: Any) -> Tensor:
        """Queries and keys x [B, T, H + Hkv, D] of a layer, as attention takes them."""
        return x
