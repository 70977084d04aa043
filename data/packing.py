"""Packing: which tokens of which documents stand in row r. Pure functions of offsets, strategy and r.

`concat`, the only packing so far. The stream of an epoch is, for each document in store order,

    [document_start] tokens [document_end]

The extra tokens per document are constant, so document d starts at stream position
`offsets[d] + d * extras`: the stream needs no memory beyond the store's own offsets. A row of T tokens
takes n = T - F stream tokens, where F is 1 with a first token and else 0. Row r covers stream positions
r * n to (r + 1) * n. Two documents `a b c`, `d e`, document_end `.`, T = 4:

    stream       a b c . d e .          |  first_token none (n = 4)   |  first_token bos (n = 3)
    row 0        tokens     a b c .     |  tokens     B a b c
                 targets    b c . d     |  targets    a b c .   <- not counted: row 1 counts it
                 doc_start  0 0 0 0     |  doc_start  0 0 0 0
    row 1        (its last target is    |  tokens     B . d e
                 missing: not complete) |  targets    . d e .
                                        |  doc_start  0 0 2 2   the first token joins the document it opens

A target is the next stream token, across the end of the row. With a first token the stream token that
opens a row is the target of that first token, so the previous row does not count it: every row counts
exactly as many targets as it consumes stream tokens, and no token is counted twice.

Traded away: documents are cut where a row ends, and the tokens after the last complete row are dropped
(at most n; the audit says how many).

Shapes: D documents, R rows per epoch, T tokens per row, N queries.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.order import hash_words
from data.strategy import Strategy

ReadTokens = Callable[[int, int], NDArray[np.integer]]
"""`read(start, stop)`: tokens of the store, documents end to end, without extras."""

_FIRST_TOKEN_KEY = 0xF1257  # keeps the draws of first tokens apart from those of the row order


class Row(NamedTuple):
    """One row; every array is [T] (see `data.batches.Batch` for the meaning of each)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    positions: NDArray[np.int64]
    doc_start: NDArray[np.int32]
    doc_end: NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Concat:
    """The stream of an epoch and its cut into rows."""

    offsets: NDArray[np.int64]
    """[D + 1] tokens before each document, in store order; the last is the number of all tokens."""
    context_length: int
    """T."""
    strategy: Strategy
    start_id: int | None = None
    """Token put before each document."""
    end_id: int | None = None
    """Token put after each document."""

    @property
    def extras(self) -> int:
        """Tokens added to each document."""
        return (self.start_id is not None) + (self.end_id is not None)

    @property
    def first(self) -> int:
        """F: row positions taken by the first token, 0 or 1."""
        return int(self.strategy.first_token != "none")

    @property
    def stride(self) -> int:
        """n: stream tokens per row."""
        return self.context_length - self.first

    @property
    def stream_length(self) -> int:
        """Tokens of the stream, extras included."""
        documents = len(self.offsets) - 1
        return int(self.offsets[-1]) + documents * self.extras

    @property
    def rows(self) -> int:
        """R: rows whose last target exists."""
        return max(0, (self.stream_length - 1) // self.stride)

    def document_start(self, document: NDArray[np.int64]) -> NDArray[np.int64]:
        """Stream position of the first token of each document [N]; D gives the end of the stream."""
        return self.offsets[document] + document * self.extras

    def document_at(self, position: ArrayLike) -> NDArray[np.int64]:
        """[N] the document that holds each stream position.

        A document's first token belongs to the document itself, and a document without tokens holds
        no position: this is the right-sided search, for the last document that starts at or before it.
        """
        if not self.extras:
            return np.searchsorted(self.offsets, position, side="right") - 1
        # The starts are not stored, so bisect on their formula.
        documents, extras, offsets = range(len(self.offsets)), self.extras, self.offsets

        def start(document: int) -> int:
            return int(offsets[document]) + document * extras

        found = [bisect_right(documents, p, key=start) - 1 for p in np.asarray(position).tolist()]
        return np.array(found, dtype=np.int64)

    def row(self, index: int, read: ReadTokens, first_id: int | None = None) -> Row:
        """Row `index`, in 0 .. R - 1, of the stream.

        Args:
            read: tokens of the store by range.
            first_id: token at row position 0; given exactly when the strategy has a first token.
        """
        assert 0 <= index < self.rows and (first_id is not None) == bool(self.first)
        stride, first, length = self.stride, self.first, self.context_length
        begin, end = index * stride, (index + 1) * stride + 1  # the last one is a target only
        head, tail = self.document_at([begin, end - 1])
        documents = np.arange(head, tail + 1)
        starts = self.document_start(documents)
        ends = self.document_start(documents + 1)
        owner = np.repeat(np.arange(len(documents)), np.minimum(ends, end) - np.maximum(starts, begin))

        stream = self._stream(begin, end, documents[0], starts, ends, read)
        tokens = np.empty(length, dtype=np.int64)
        tokens[first:] = stream[:stride]
        token_owner = np.empty(length, dtype=np.int64)
        token_owner[first:] = owner[:stride]
        if first_id is not None:
            tokens[0], token_owner[0] = first_id, owner[0]

        # Row position of stream position p is p - begin + first; whoever opens the row owns its first token.
        row_start = np.where(starts <= begin, 0, starts - begin + first)
        row_end = np.minimum(ends - begin + first, length)
        doc_start = row_start[token_owner]
        same_document = token_owner == owner[1 - first :]
        positions = np.arange(length)
        return Row(
            tokens=tokens,
            targets=stream[1 - first :],
            loss_mask=self._counted(same_document),
            positions=positions - doc_start if self.strategy.positions == "document" else positions,
            doc_start=doc_start.astype(np.int32),
            doc_end=row_end[token_owner].astype(np.int32),
        )

    def _stream(
        self,
        begin: int,
        end: int,
        head: np.int64,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        read: ReadTokens,
    ) -> NDArray[np.int64]:
        """Stream tokens [begin, end), of documents that start and end at `starts` and `ends`."""
        stream = np.empty(end - begin, dtype=np.int64)
        is_text = np.ones(end - begin, dtype=bool)
        for extra, places in ((self.start_id, starts), (self.end_id, ends - 1)):
            if extra is not None:
                places = places[(places >= begin) & (places < end)] - begin
                stream[places] = extra
                is_text[places] = False
        # The text of consecutive documents is consecutive in the store: one range covers the row.
        skipped = begin - int(starts[0]) - (self.start_id is not None)
        text = int(self.offsets[head]) + max(skipped, 0)
        stream[is_text] = read(text, text + int(is_text.sum()))
        return stream

    def _counted(self, same_document: NDArray[np.bool_]) -> NDArray[np.bool_]:
        counted = same_document.copy() if self.strategy.mask == "document" else np.ones_like(same_document)
        if self.first:
            counted[-1] = False
        # Inside the prefix the target is visible to the query.
        counted[: max(self.strategy.prefix_lm - 1, 0)] = False
        return counted


def random_tokens(
    rows: NDArray[np.int64],
    *,
    seed: int,
    epoch: ArrayLike,
    vocab_size: int,
    special_ids: tuple[int, ...],
) -> NDArray[np.int64]:
    """A token for each row [N], uniform over the ids that are not special: a function of (seed, epoch, row)."""
    ordinary = vocab_size - len(special_ids)
    # The modulo favours some ids by less than one part in 2**40.
    drawn = (hash_words(_FIRST_TOKEN_KEY, seed, epoch, rows) % np.uint64(ordinary)).astype(np.int64)
    for special in sorted(special_ids):
        drawn += drawn >= special
    return drawn
