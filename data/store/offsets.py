"""Offsets: tokens before each document of a split, read from the mapped shards when asked for.

Memory does not grow with the number of documents: what is kept is two integers a shard. A look-up touches the
pages of the shards' own offsets, some twenty of them for the document that holds a position.

Shapes: D documents, S shards, N queries.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_FEW = 24  # below, bisecting one query after the other costs less than bisecting all in step


class Offsets:
    """[D + 1] tokens before each document, in store order; the last is the number of all tokens.

    Args:
        documents, tokens: of each shard, [S].
        read: the offsets inside a shard by its number, [documents + 1] int64, from 0.
    """

    def __init__(
        self, documents: Sequence[int], tokens: Sequence[int], read: Callable[[int], NDArray[np.int64]]
    ) -> None:
        self._first_document = np.cumsum([0, *documents], dtype=np.int64)
        self._first_token = np.cumsum([0, *tokens], dtype=np.int64)
        self._read = read

    @property
    def documents(self) -> int:
        """D."""
        return int(self._first_document[-1])

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._first_token[-1])

    def __len__(self) -> int:
        return self.documents + 1

    def __getitem__(self, documents: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Tokens before each of some documents [N], in 0 .. D; a slice gives those of a range."""
        if isinstance(documents, slice):
            return self[np.arange(*documents.indices(len(self)))]
        result = np.empty(len(documents), dtype=np.int64)
        for shard, chosen in self._shards_of(documents):
            result[chosen] = self._read(shard)[documents[chosen] - self._first_document[shard]]
            result[chosen] += self._first_token[shard]
        return result

    def _shards_of(self, documents: NDArray[np.int64]) -> list[tuple[int, NDArray[np.intp] | slice]]:
        """(shard, which of the documents it holds); the end of the last document belongs to the last shard."""
        if not len(documents):
            return []
        if len(self._first_document) == 2:
            return [(0, slice(None))]
        shards = np.searchsorted(self._first_document[:-1], documents, side="right") - 1
        first = int(shards[0])
        if (shards == first).all():
            return [(first, slice(None))]
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]

    def find(self, positions: NDArray[np.int64], extras: int = 0) -> NDArray[np.int64]:
        """[N] the document that holds each position of the stream in which `extras` tokens are added to a document.

        A document's first token belongs to the document itself, and a document without tokens holds no position:
        this is the right-sided search, for the last document that starts at or before it.
        """
        bases = self._first_token[:-1] + self._first_document[:-1] * extras
        result = np.empty(len(positions), dtype=np.int64)
        shards = np.searchsorted(bases, positions, side="right") - 1
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            local = positions[chosen] - bases[shard]
            result[chosen] = _find(self._read(int(shard)), local, extras) + self._first_document[shard]
        return result


def _find(offsets: NDArray[np.int64], positions: NDArray[np.int64], extras: int) -> NDArray[np.int64]:
    """`Offsets.find` inside one shard: `offsets` [documents + 1], from 0."""
    documents = len(offsets) - 1
    if not extras:
        return np.searchsorted(offsets[:-1], positions, side="right") - 1
    if len(positions) < _FEW:  # the starts are not stored, so bisect on their formula
        item = offsets.item
        numbers = range(documents)
        result = [bisect_right(numbers, p, key=lambda d: item(d) + d * extras) - 1 for p in positions.tolist()]
        return np.array(result, dtype=np.int64)
    low = np.zeros(len(positions), dtype=np.int64)  # starts at or before the position
    high = np.full(len(positions), documents)  # starts after it, or is none
    for _ in range(documents.bit_length()):
        middle = (low + high) >> 1
        before = offsets[middle] + middle * extras <= positions
        np.copyto(low, middle, where=before)
        np.copyto(high, middle, where=~before)
    return low
