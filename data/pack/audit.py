"""Audit: what a strategy makes of a token store, counted exactly from document offsets.

Saved with every run, so that arms of a study can be compared for what they changed and, by
`document_order`, for what they share. No token is read: one pass over the pieces that stand in the rows of
the first epoch, in parts of bounded memory, in the notation of `layout` and `assemble`.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkbed.data.pack.assemble import loss_mask, places
from sinkbed.data.pack.batches import Rows
from sinkbed.data.pack.layout import Layout, Pieces
from sinkbed.data.store.offsets import Offsets

_CHUNK_TOKENS = 2**20  # rows at a time
_CHUNK_DOCUMENTS = 2**20


@dataclass
class _Counts:
    """What the pass over the rows adds up."""

    documents: int = 0
    """Documents in each row, over all rows."""
    most: int = 0
    """Documents in the row that holds most."""
    opened: int = 0
    """Rows that begin with the first token of a document, but for their own first token."""
    begun: int = 0
    """Documents whose beginning a row holds."""
    not_whole: int = 0
    """Documents of which a row holds the beginning and not the end."""
    inputs: int = 0
    repeated: int = 0
    """Inputs that are read a second time."""
    bos: int = 0
    """Rows with BOS at position 0."""
    targets: int = 0


def audit(rows: Rows) -> dict[str, Any]:
    """Count what one epoch of `rows` holds.

    Returns plain JSON types: numbers per epoch, shares between 0 and 1, and two digests:
    `document_order`, sha256 of the document offsets, equal for all arms that read the same documents in
    the same order; `store_digest`, which also tells the tokens apart.
    """
    layout, store = rows.layout, rows.store
    length, count = layout.context_length, len(rows)
    c, placed = _Counts(), 0
    for index in _chunks(rows):
        _count_structure(c, layout, index)
        with_first = rows.with_first(index, np.zeros_like(index))
        placed += int(with_first.sum()) * len(rows.strategy.placed)
        for kind in (True, False):
            if (of_kind := index[with_first == kind]).size:
                _count_contents(c, rows, of_kind, kind)
    read = c.inputs - c.repeated
    # Of a part of the rows, what the others hold is not cropped but left for another run.
    every_row = rows.unique_rows is None
    documents = store.documents if every_row else c.begun
    return {
        "strategy": dataclasses.asdict(rows.strategy),
        "context_length": length,
        "split": store.split,
        "seed": rows.seed,
        "rows_per_epoch": count,
        "unique_rows": rows.unique_rows,
        "tokens_per_epoch": count * length,
        "stream_tokens_per_epoch": read,
        "targets_per_epoch": c.targets,
        "documents": documents,
        "documents_per_row_mean": c.documents / count,
        "documents_per_row_max": c.most,
        "share_of_rows_that_begin_with_bos": c.bos / count,
        "share_of_rows_that_begin_a_document": c.opened / count,
        "share_of_tokens_padding": 1 - (c.inputs + placed) / (count * length),
        "documents_cut": c.not_whole,
        "share_of_documents_cut": c.not_whole / max(1, documents),
        "tokens_cropped": layout.stream_length - read if every_row else None,
        "share_of_tokens_cropped": 1 - read / layout.stream_length if every_row else None,
        "share_of_tokens_repeated": c.repeated / c.inputs,
        "share_of_targets_not_counted": 1 - c.targets / (count * length),
        "document_order": _digest(store.offsets),
        "store_digest": store.digest,
    }


def _chunks(rows: Rows) -> Iterator[NDArray[np.int64]]:
    step = max(1, _CHUNK_TOKENS // rows.context_length)
    for begin in range(0, len(rows), step):
        yield np.arange(begin, min(begin + step, len(rows)))


def _count_structure(c: _Counts, layout: Layout, index: NDArray[np.int64]) -> None:
    """How documents lie in the rows, as if all had their first token."""
    pieces = layout.pieces(index)
    at = places(pieces)
    seen = at < pieces.inputs[pieces.row]
    per_row = np.bincount(pieces.row[seen], minlength=len(index))
    c.documents += int(per_row.sum())
    c.most = max(c.most, int(per_row.max()))
    begins = pieces.begin == 0
    c.opened += int((begins & (at == 0)).sum())
    c.begun += int((seen & begins & ~pieces.repeated).sum())
    end = np.minimum(pieces.end, pieces.begin + pieces.inputs[pieces.row] - at)
    c.not_whole += int((seen & begins & ~pieces.repeated & (end < pieces.length)).sum())


def _count_contents(c: _Counts, rows: Rows, index: NDArray[np.int64], with_first: bool) -> None:
    """Tokens and targets of rows that all have their first token, or all lack it."""
    layout, strategy = rows.layout, rows.strategy
    pieces = layout.pieces(index, with_first or not strategy.placed)
    at = places(pieces)
    size = pieces.end - pieces.begin
    c.inputs += int(pieces.inputs.sum())
    again = np.minimum(size, pieces.inputs[pieces.row] - at)[pieces.repeated]
    c.repeated += int(pieces.context.sum() + again.sum())
    c.bos += _opened_by_bos(rows, pieces, at, with_first)

    c.targets += int(loss_mask(layout, pieces, at, strategy.placed if with_first else ()).sum())


def _opened_by_bos(rows: Rows, pieces: Pieces, at: NDArray[np.int64], with_first: bool) -> int:
    """Rows whose token at position 0 is BOS, whether by the first token or by where a document's marker falls."""
    manifest, layout, first_of_row = rows.store.manifest, rows.layout, rows.strategy.first_of_row
    if with_first and first_of_row != "none":
        # A random token is never a special one.
        bos = first_of_row != "random" and manifest.token_id(first_of_row) == manifest.bos_id
        return len(pieces.inputs) if bos else 0
    first = at == 0
    opened = np.zeros_like(first)
    if layout.start_id == manifest.bos_id:
        opened |= pieces.begin == 0
    if layout.end_id == manifest.bos_id:
        opened |= pieces.begin == pieces.length - 1
    return int((first & opened).sum())


def _digest(offsets: Offsets) -> str:
    digest = hashlib.sha256()
    for begin in range(0, len(offsets), _CHUNK_DOCUMENTS):
        digest.update(offsets[begin : begin + _CHUNK_DOCUMENTS].astype("<i8").tobytes())
    return digest.hexdigest()
