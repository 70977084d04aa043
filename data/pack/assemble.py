"""Packing: pieces of documents to rows of tokens, targets and boundaries; all rows of a batch at once.

`layout` says which pieces stand in a row. Here they become arrays: markers and placed tokens are put in,
text is read from the store, padding fills up. Text flows around placed tokens. A placed token predicts the text
that follows it, belongs to the document it stands before, and is never a target.

Shapes: N rows, T tokens per row, P pieces, F placed tokens, W = T - F + 1 columns of content: what a row holds
but for placed tokens, and the target beyond its end.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sinkbed.data.order import hash_words
from sinkbed.data.pack.layout import Layout, Pieces

Gather = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.integer]]
"""`gather(starts, lengths)`: tokens of the store, documents end to end, without markers; the ranges joined."""

_FIRST_TOKEN_KEY = 0xF1257  # keeps the draws of first tokens apart from those of the row order
_SHARE_KEY = 0x54A8E


class Row(NamedTuple):
    """N rows; every array is [N, T] (see `batches.Batch` for the meaning of each)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    doc_start: NDArray[np.int32]
    doc_end: NDArray[np.int32]


def pack(
    layout: Layout,
    index: NDArray[np.int64],
    gather: Gather,
    *,
    placed_ids: NDArray[np.int64] | None = None,
    padding_id: int = 0,
) -> Row:
    """Rows `index` [N], each in 0 .. R - 1, of a layout.

    Args:
        gather: tokens of the store by ranges.
        placed_ids: [N, F] the tokens at the strategy's placed positions; None for rows without them.
        padding_id: what stands where a row holds nothing.
    """
    length, strategy = layout.context_length, layout.strategy
    placed = () if placed_ids is None else strategy.placed
    slots = np.delete(np.arange(length), placed)
    pieces = layout.pieces(index, with_first=placed_ids is not None or not strategy.placed)
    at = places(pieces)
    content = _content(layout, pieces, at, len(slots) + 1, gather, padding_id)
    lead = len(strategy.first_tokens) if placed else 0
    skip = lead - len(placed)
    tokens = np.empty((len(index), length), dtype=np.int64)
    tokens[:, lead:] = content[:, skip:-1]
    if placed_ids is not None:
        tokens[:, slots[:skip]] = content[:, :skip]
        tokens[:, list(placed)] = placed_ids
    short = np.flatnonzero(pieces.inputs < len(slots))
    tokens[short, slots[pieces.inputs[short]]] = padding_id  # a target only

    targets = _predicted(content, layout, placed, np.int64)
    doc_start, doc_end = _boundaries(pieces, at, slots, length)
    return Row(tokens, targets, loss_mask(layout, pieces, at, placed), doc_start, doc_end)


def places(pieces: Pieces) -> NDArray[np.int64]:
    """[P] column of a row's content at which each piece begins."""
    size = pieces.end - pieces.begin
    before = np.cumsum(size) - size
    opens = np.searchsorted(pieces.row, np.arange(len(pieces.inputs)))
    return before - before[opens][pieces.row]


def _sizes(pieces: Pieces) -> NDArray[np.int64]:
    """[N] tokens of content in each row, the target beyond its end included."""
    return np.bincount(pieces.row, pieces.end - pieces.begin, minlength=len(pieces.inputs)).astype(np.int64)


def _content(
    layout: Layout, pieces: Pieces, at: NDArray[np.int64], width: int, gather: Gather, padding_id: int
) -> NDArray[np.integer]:
    """Tokens [N, W] of the pieces and the markers between them."""
    start, end = int(layout.start_id is not None), int(layout.end_id is not None)
    text_begin = np.maximum(pieces.begin - start, 0)
    text_end = np.minimum(pieces.end - start, pieces.length - start - end)
    text = gather(layout.offsets[pieces.document] + text_begin, np.maximum(text_end - text_begin, 0))

    sizes, rows = _sizes(pieces), len(pieces.inputs)
    first = pieces.row * width + at  # in the flattened content
    last = first + pieces.end - pieces.begin - 1
    content = np.full(rows * width, padding_id, dtype=text.dtype)  # narrow until it is copied to its places
    is_text = np.ones(rows * width, dtype=np.bool_)
    if (sizes < width).any():
        is_text.reshape(rows, width)[np.arange(width) >= sizes[:, None]] = False
    for marker, places in (
        (layout.start_id, first[pieces.begin == 0]),
        (layout.end_id, last[pieces.end == pieces.length]),
    ):
        if marker is not None:
            content[places] = marker
            is_text[places] = False
    content[is_text] = text
    return content.reshape(rows, width)


def _predicted(content: NDArray[Any], layout: Layout, placed: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """[N, T] the content [N, W] that each row position predicts: that after the last slot up to it."""
    length, lead = layout.context_length, len(layout.strategy.first_tokens) if placed else 0
    slots = np.delete(np.arange(length), placed)
    predicted = np.empty((len(content), length), dtype=dtype)
    # Beyond the first tokens slots are consecutive: a slice does what an index of all columns would.
    predicted[:, lead:] = content[:, lead - len(placed) + 1 :]
    predicted[:, :lead] = content[:, np.searchsorted(slots, np.arange(lead), side="right")]
    return predicted


def loss_mask(layout: Layout, pieces: Pieces, at: NDArray[np.int64], placed: tuple[int, ...]) -> NDArray[np.bool_]:
    """[N, T] whether the target of each row position counts; reads no token.

    Args:
        at: [P] the pieces' columns of content; placed: row positions of placed tokens, in rows that have them.
    """
    strategy, sizes = layout.strategy, _sizes(pieces)
    slots = np.delete(np.arange(layout.context_length), placed)
    columns = np.arange(len(slots) + 1)
    counted = np.ones((len(sizes), len(columns)), dtype=np.bool_)
    if (sizes < len(columns)).any():
        counted &= columns < sizes[:, None]
    # Where a piece begins, its document does, unless it opens the row; another document precedes, or a placed token.
    after_placed = np.isin(np.append(slots, layout.context_length) - 1, placed)
    precedes = (at == 0) | after_placed[at] | (strategy.mask == "causal")
    begins = (pieces.begin == 0) | ((at == 0) & layout.counts_resumed)
    counted[pieces.row, at] &= precedes & begins
    if not layout.counts_beyond:
        beyond = np.flatnonzero(sizes > pieces.inputs)
        counted[beyond, pieces.inputs[beyond]] = False
    if not placed and strategy.placed:
        opens = pieces.context + (strategy.first_of_row == "none")
        counted &= columns >= opens[:, None]
    mask = _predicted(counted, layout, placed, np.bool_)
    mask[:, [p - 1 for p in placed if p]] = False  # what follows is no text
    mask[:, : max(strategy.prefix_lm - 1, 0)] = False  # inside the prefix the target is visible to the query
    return mask


def _boundaries(
    pieces: Pieces, at: NDArray[np.int64], slots: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Row position [N, T] where the document of each position starts, and after its last in this row."""
    edge = np.append(0, slots + 1)  # row position at which a piece that begins in a column does, placed tokens included
    edge[-1] = length
    seen = at < pieces.inputs[pieces.row]  # others are the target beyond the row
    row, begin = pieces.row[seen], at[seen]
    end = np.minimum(begin + (pieces.end - pieces.begin)[seen], pieces.inputs[row])
    start_at, end_at = edge[begin], edge[end]
    short = np.flatnonzero(pieces.inputs < len(slots))
    if len(short):  # padding is a document of its own
        order = np.argsort(np.concatenate([row, short]), kind="stable")
        start_at = np.concatenate([start_at, edge[pieces.inputs[short]]])[order]
        end_at = np.concatenate([end_at, np.full(len(short), length)])[order]
    shape, size = (len(pieces.inputs), length), end_at - start_at
    return (
        np.repeat(start_at.astype(np.int32), size).reshape(shape),
        np.repeat(end_at.astype(np.int32), size).reshape(shape),
    )


def has_first_token(rows: NDArray[np.int64], *, share: float, seed: int, epoch: ArrayLike) -> NDArray[np.bool_]:
    """Whether each row [N] has its first token, with probability `share`: a function of (seed, epoch, row)."""
    # A share is compared in 53 bits, which a float holds exactly.
    return (hash_words(_SHARE_KEY, seed, epoch, rows) >> np.uint64(11)).astype(np.float64) < share * 2.0**53


def random_tokens(
    rows: NDArray[np.int64],
    *,
    seed: int,
    epoch: ArrayLike,
    vocab_size: int,
    special_ids: tuple[int, ...],
    position: int = 0,
) -> NDArray[np.int64]:
    """A token for a position of each row [N], uniform over the ids that are not special.

    A function of (seed, epoch, row, position).
    """
    ordinary = vocab_size - len(special_ids)
    words = (seed, epoch, rows, position) if position else (seed, epoch, rows)
    # The modulo favours some ids by less than one part in 2**40.
    drawn = (hash_words(_FIRST_TOKEN_KEY, *words) % np.uint64(ordinary)).astype(np.int64)
    for special in sorted(special_ids):
        drawn += drawn >= special
    return drawn
