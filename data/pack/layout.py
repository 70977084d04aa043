"""Layouts: which pieces of which documents stand in row r. Pure functions of offsets, strategy and r.

A document's tokens are its text with the tokens put before and after it:

    [document_start] text [document_end]

A row of T positions has room for n = T - F of them, where F positions are placed tokens (the first token).

`Stream`. All documents end to end are the stream of an epoch; row r holds stream positions r * n to (r + 1) * n.
Document d starts at `offsets[d] + d * extras`, so nothing is stored beside the store's own offsets. Two documents
`a b c`, `d e`, document_end `.`, T = 4:

    stream       a b c . d e .          |  first_token none (n = 4)   |  first_token bos (n = 3)
    row 0        tokens     a b c .     |  tokens     B a b c
                 targets    b c . d     |  targets    a b c .   <- not counted: row 1 counts it
                 doc_start  0 0 0 0     |  doc_start  0 0 0 0
    row 1        (its last target is    |  tokens     B . d e
                 missing: not complete) |  targets    . d e .
                                        |  doc_start  0 0 2 2   the first token joins the document it opens

A target is the next stream token, across the end of the row. A first token predicts the stream token that opens
its row, so the previous row does not count it: every row counts exactly as many targets as it consumes stream
tokens, and no token is counted twice. A row drawn without the first token (`first_token_share`) shows the stream
tokens before it in its place; under a causal mask it counts the same targets.

`Planned`. Every other packing: rows hold whole documents, or pieces of n tokens of those that are longer, as
`plan` laid them out. A token is counted where the token before it in its document stands, in that row; the
first of a document where anything precedes it in the row (under a document mask: a first token). A row may end in
padding, which is a document of its own that nothing else sees.

Shapes: D documents, R rows per epoch, T tokens per row, N rows asked for, P pieces.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sinkbed.data.pack.plan import Plan
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.offsets import Offsets

Ints = NDArray[np.int64]


class Pieces(NamedTuple):
    """What N rows hold, before placed tokens and padding: P pieces of documents, row by row."""

    row: Ints
    """[P] which of the N rows; not descending."""
    document: Ints
    """[P]"""
    begin: Ints
    """[P] first token of the piece in its document, markers counted."""
    end: Ints
    """[P] after its last."""
    length: Ints
    """[P] tokens of the whole document, markers counted."""
    repeated: NDArray[np.bool_]
    """[P] whether it fills up a row with what another row holds."""
    inputs: Ints
    """[N] tokens of the row that are inputs. One more, where there is one, is the last input's target only."""
    context: Ints
    """[N] inputs at the start of the row that stand in for its first token: read, but counted elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(ABC):
    """What all layouts know."""

    counts_resumed: ClassVar[bool]
    """Whether a row that opens inside a document counts the token it opens with."""
    offsets: Offsets
    """Tokens before each document, in store order."""
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
    def room(self) -> int:
        """n: tokens of documents in a row that has all its placed tokens."""
        return self.context_length - len(self.strategy.placed)

    @property
    def stream_length(self) -> int:
        """Tokens of all documents, markers included."""
        return self.offsets.tokens + self.offsets.documents * self.extras

    @property
    @abstractmethod
    def rows(self) -> int:
        """R."""

    @property
    @abstractmethod
    def counts_beyond(self) -> bool:
        """Whether a row counts the token after its last input, where it has it."""

    @abstractmethod
    def pieces(self, index: Ints, with_first: bool = True) -> Pieces:
        """The pieces in rows `index` [N], each in 0 .. R - 1; `with_first`: these rows have their first token."""

    @property
    def pads(self) -> bool:
        """Whether rows may end in padding."""
        return self.strategy.first_token_share < 1

    def verify(self) -> None:  # noqa: B027  # a layout that keeps nothing has nothing to compare
        """Compare what is kept on disk of this layout with what it was made from. Raises ValueError for damage."""

    def bounds(self, document: Ints) -> tuple[Ints, Ints]:
        """Stream positions [N] of the first token of each document and after its last, markers included."""
        edges = self.offsets[np.concatenate([document, document + 1])].reshape(2, -1)
        return edges[0] + document * self.extras, edges[1] + (document + 1) * self.extras


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream(Layout):
    """One stream of all documents, cut into rows."""

    counts_resumed: ClassVar[bool] = True  # by the first token, or whatever stands in its place

    @property
    def rows(self) -> int:
        """R: rows whose last target exists."""
        return max(0, (self.stream_length - 1) // self.room)

    @property
    def counts_beyond(self) -> bool:
        """Unless the next row's first token predicts it."""
        return self.strategy.first_of_row == "none"

    def pieces(self, index: Ints, with_first: bool = True) -> Pieces:
        opens = index * self.room
        context = np.minimum(0 if with_first else self.context_length - self.room, opens)
        begin, beyond = opens - context, opens + self.room + 1  # the last one is a target only
        head, tail = self.offsets.find(np.concatenate([begin, beyond - 1]), self.extras).reshape(2, -1)
        per_row = tail - head + 1
        row = np.repeat(np.arange(len(index)), per_row)
        document = np.arange(len(row)) + (head - np.cumsum(per_row) + per_row)[row]
        starts, ends = self.bounds(document)
        first, last = np.maximum(starts, begin[row]), np.minimum(ends, beyond[row])
        kept = last > first  # documents without a single token hold no position
        if not kept.all():
            row, document, first, last, starts, ends = (c[kept] for c in (row, document, first, last, starts, ends))
        return Pieces(
            row=row,
            document=document,
            begin=first - starts,
            end=last - starts,
            length=ends - starts,
            repeated=np.zeros(len(row), dtype=np.bool_),
            inputs=beyond - 1 - begin,
            context=context,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Layout):
    """Rows of whole documents, as a plan says."""

    counts_resumed: ClassVar[bool] = False  # it was counted where the token before it stands
    plan: Plan

    @property
    def rows(self) -> int:
        """R: rows of the plan."""
        return self.plan.rows

    @property
    def counts_beyond(self) -> bool:
        """Where a document goes on in another row, its next token is counted here."""
        return True

    @property
    def pads(self) -> bool:
        """Even `fill` leaves some: where documents run out."""
        return True

    def verify(self) -> None:
        self.plan.verify()

    def pieces(self, index: Ints, with_first: bool = True) -> Pieces:
        """Rows without their first token begin with the same piece."""
        per_row, document, begin = self.plan.read(index)
        repeated, begin = begin < 0, np.maximum(begin, 0)
        row = np.repeat(np.arange(len(index)), per_row)
        starts, ends = self.bounds(document)
        length, room = ends - starts, self.room
        size = np.minimum(length - begin, room)
        filled = np.cumsum(size)
        last = np.cumsum(per_row) - 1
        before = np.concatenate([[0], filled[last[:-1]]])
        over = np.maximum(filled[last] - before - room, 0)  # what fills up a row is cropped at its end
        size[last] -= over
        goes_on = (size[last] == room) & (begin[last] + room < length[last])
        goes_on &= self.strategy.overflow == "split"
        inputs = filled[last] - before - over
        end = begin + size
        end[last] += goes_on
        return Pieces(row, document, begin, end, length, repeated, inputs, np.zeros_like(inputs))
