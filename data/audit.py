"""Audit: what a strategy makes of a token store, counted exactly from document offsets.

Saved with every run, so that arms of a study can be compared for what they changed and, by
`document_order`, for what they share. No row is made and no token is read: one pass over the offsets,
in pieces of bounded memory, in the notation of `data.packing` (row r covers stream positions r * n to
(r + 1) * n; R rows).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.batches import Rows
from data.packing import Concat

_CHUNK = 2**20  # documents at a time: some 50 MB of temporaries


@dataclass
class _Counts:
    """What the pass over the documents adds up."""

    starts: int = 0
    """Documents whose first token stands in a row."""
    starts_at_row: int = 0
    """Rows whose first stream token is the first of a document."""
    cut: int = 0
    """Documents with a row boundary inside."""
    uncounted: int = 0
    """Targets left out because they belong to another document, and for no other reason."""
    most: int = 0
    """Documents in the row that holds most."""


def audit(rows: Rows) -> dict[str, Any]:
    """Count what one epoch of `rows` holds.

    Returns plain JSON types: numbers per epoch, shares between 0 and 1, and two digests:
    `document_order`, sha256 of the document offsets, equal for all arms that read the same documents in
    the same order; `store_digest`, which also tells the tokens apart.
    """
    layout, store, strategy = rows.layout, rows.store, rows.strategy
    length, count = layout.context_length, layout.rows
    counts = _count(layout)
    # A row that does not open with a document start holds the rest of one more document.
    documents = counts.starts + count - counts.starts_at_row
    always_uncounted = max(strategy.prefix_lm - 1, 0) + layout.first
    uncounted = count * always_uncounted
    if strategy.mask == "document":
        uncounted += counts.uncounted
    dropped = layout.stream_length - count * layout.stride
    return {
        "strategy": dataclasses.asdict(strategy),
        "context_length": length,
        "split": store.split,
        "seed": rows.seed,
        "rows_per_epoch": count,
        "tokens_per_epoch": count * length,
        "stream_tokens_per_epoch": count * layout.stride,
        "targets_per_epoch": count * length - uncounted,
        "documents": store.documents,
        "documents_per_row_mean": documents / count,
        "documents_per_row_max": counts.most,
        "share_of_rows_that_begin_with_bos": _rows_with_bos(rows, counts) / count,
        "share_of_rows_that_begin_a_document": counts.starts_at_row / count,
        "share_of_tokens_padding": 0.0,
        "documents_cut": counts.cut,
        "share_of_documents_cut": counts.cut / store.documents,
        "tail_tokens_dropped": dropped,
        "share_of_targets_not_counted": uncounted / (count * length),
        "document_order": _digest(store.offsets),
        "store_digest": store.digest,
    }


def _rows_with_bos(rows: Rows, counts: _Counts) -> int:
    """Rows whose token at position 0 is BOS, whether by the first token or by where a document's marker falls."""
    bos, layout = rows.store.manifest.bos_id, rows.layout
    first = rows.strategy.first_token
    if first != "none":
        return len(rows) if first == "bos" or first == bos else 0
    at_start = counts.starts_at_row if layout.start_id == bos else 0
    if layout.end_id != bos:
        return at_start
    return at_start + _rows_that_begin_with_an_end(layout)


def _count(layout: Concat) -> _Counts:
    """One pass over the documents that hold at least one stream token."""
    total = _Counts()
    stride, limit = layout.stride, layout.rows * layout.stride
    prefix = max(layout.strategy.prefix_lm - 1, 0)
    last_row, last_documents = -1, 0
    for start, end in _extents(layout):
        total.cut += int(np.count_nonzero(np.minimum(end - 1, limit) // stride > start // stride))
        start = start[start <= limit]
        # The target at stream position s is predicted from position s - 1 of the row before or the same.
        predictor = (start[start > 0] - 1) % stride + layout.first
        last_counts = layout.context_length - layout.first
        total.uncounted += int(np.count_nonzero((predictor >= prefix) & (predictor < last_counts)))
        start = start[start < limit]
        opens = start % stride == 0
        total.starts += len(start)
        total.starts_at_row += int(np.count_nonzero(opens))
        if not len(start):
            continue
        row, documents = np.unique(start // stride, return_counts=True)
        # One more in rows that open in the middle of a document.
        documents = documents + ~np.isin(row, start[opens] // stride)
        if row[0] == last_row:  # the previous piece of documents counted how this row opens
            documents[0] += last_documents - 1
        total.most = max(total.most, int(documents.max()))
        last_row, last_documents = int(row[-1]), int(documents[-1])
    total.most = max(total.most, 1)
    return total


def _rows_that_begin_with_an_end(layout: Concat) -> int:
    """Rows whose first stream token is the last of a document, which its end marker is."""
    found = 0
    for _, end in _extents(layout):
        last = end - 1
        inside = (last < layout.rows * layout.stride) & (last % layout.stride == 0)
        found += int(np.count_nonzero(inside))
    return found


def _extents(layout: Concat) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pieces of (start, end) stream positions of the documents that hold a token; each [<= _CHUNK] int64."""
    documents = len(layout.offsets) - 1
    for begin in range(0, documents, _CHUNK):
        edges = layout.document_start(np.arange(begin, min(begin + _CHUNK, documents) + 1))
        held = edges[1:] > edges[:-1]
        if held.any():
            yield edges[:-1][held], edges[1:][held]


def _digest(offsets: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for begin in range(0, len(offsets), _CHUNK):
        digest.update(np.ascontiguousarray(offsets[begin : begin + _CHUNK], dtype="<i8").tobytes())
    return digest.hexdigest()
