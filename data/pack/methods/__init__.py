"""Packings, a file each: how documents become rows.

Shapes: I items, R rows, P pieces.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sinkbed.registry import Registry

PACKINGS = Registry("data.strategy.packing", __name__)
Ints = NDArray[np.int64]


class Items(NamedTuple):
    """What is laid out, in store order; every array is [I]."""

    document: Ints
    begin: Ints
    """First token in its document, markers counted."""
    length: Ints
    """Tokens, at most the room of a row."""


class Laid(NamedTuple):
    """Rows of a window."""

    per_row: Ints
    """[R] pieces of each row."""
    piece: Ints
    """[P] items, row by row."""
    repeated: NDArray[np.bool_] | bool = False
    """[P] which of them stand elsewhere too."""


class Packing:
    """One packing, made from the strategy's `fill`. It lays out a window of items; of these no row splits any."""

    fills: tuple[str, ...] = ("pad",)
    """Values of `fill` that it has."""
    shares_rows = True
    """Whether several documents may stand in a row."""
    is_stream = False
    """Whether the documents are one stream that is cut wherever a row ends, and nothing is laid out."""

    def __init__(self, fill: str = "pad") -> None:
        self.fill = fill

    def lay_out(self, items: Items, room: int) -> Laid:
        """Items to rows of `room` tokens. Every item stands in one row, but for those that `fill` crops or repeats."""
        raise NotImplementedError
