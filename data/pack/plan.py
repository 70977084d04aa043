"""Plan: which documents share a row, for every packing that keeps documents whole.

Documents are taken in windows of bounded size, in store order, and each window is laid out by itself: memory
does not grow with the corpus, and windows do not depend on shards. What is laid out are items: a document with its
markers, or, of one longer than a row, its pieces of row length and a rest.

A plan is kept beside the token store, as an Arrow file of one record batch a window and one record a row, and
mapped into memory. Where it cannot be written it is made anew in each process.

Shapes: R rows, N rows asked for, I items, P pieces.
"""

import inspect
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sinkbed.data.files import replacing, sha256_file, sha256_json
from sinkbed.data.pack.methods import PACKINGS, Ints, Items, Laid, Packing
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.offsets import Offsets

FORMAT = 1
_WINDOW_TOKENS = 2**26
_WINDOW_DOCUMENTS = 2**20
_MAPPED_WINDOWS = 256
_SCHEMA = pa.schema([(name, pa.large_list(pa.int64())) for name in ("documents", "begins")])


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """All that decides a plan."""

    strategy: Strategy
    room: int
    """Tokens of documents that a row holds."""
    extras: int
    """Tokens added to each document."""

    @property
    def packing(self) -> Packing:
        """What lays out a window."""
        packing: Packing = PACKINGS.make(self.strategy.packing, self.strategy.fill)
        return packing

    def key(self, digest: str) -> str:
        """A name for the plan of the split with this digest."""
        s = self.strategy
        code = sha256_file(Path(inspect.getfile(self.packing.lay_out)))
        parts = [FORMAT, digest, s.packing, code, s.overflow, s.fill, self.room, self.extras]
        name = s.packing if isinstance(s.packing, str) else next(iter(s.packing))
        return f"{name}-{self.room}-{sha256_json(parts)[:16]}"


class Plan:
    """The rows of a split, read window by window from its file or from memory."""

    def __init__(
        self, settings: PlanSettings, offsets: Offsets, source: pa.NativeFile, path: Path | None = None
    ) -> None:
        self._settings, self._offsets, self._path = settings, offsets, path
        self._reader = pa.ipc.open_file(source)
        if self._reader.schema != _SCHEMA:
            raise pa.ArrowInvalid(f"columns {self._reader.schema.names}")
        counts = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        self._first_row = np.cumsum([0, *counts], dtype=np.int64)
        self._windows: OrderedDict[int, tuple[Ints, Ints, Ints]] = OrderedDict()

    @classmethod
    def load(cls, settings: PlanSettings, offsets: Offsets, folder: Path, digest: str) -> "Plan":
        """The plan of the split with this digest: mapped from `folder`, where it is made first if need be."""
        path = folder / f"{settings.key(digest)}.arrow"
        try:
            for attempt in range(2):
                if attempt or not path.is_file():
                    with replacing(path) as file:  # others do the same and agree
                        _make(file, settings, offsets)
                try:
                    return cls(settings, offsets, pa.memory_map(os.fspath(path)), path)
                except (pa.ArrowException, LookupError, OSError, ValueError) as error:
                    if getattr(error, "errno", None):
                        raise  # else damaged: what it had can be made again
        except OSError as error:  # a read-only or a full disk
            warnings.warn(
                f"{path}: the layout of rows could not be kept ({error}); every process lays it out anew, in its own "
                "memory. Make that folder writable, or prepare a store of your own",
                stacklevel=2,
            )
        sink = pa.BufferOutputStream()
        _make(sink, settings, offsets)
        return cls(settings, offsets, pa.BufferReader(sink.getvalue()))

    def verify(self) -> None:
        """Lay out everything again and compare. Raises ValueError that names a damaged file."""
        for number, (start, stop) in enumerate(windows(self._offsets)):
            items = items_of(self._offsets, start, stop, self._settings)
            expected = _columns(items, self._settings.packing.lay_out(items, self._settings.room))
            if not all(np.array_equal(a, b) for a, b in zip(self._window(number), expected, strict=True)):
                raise self._damaged("other documents in its rows than the token store gives")

    def _damaged(self, what: object) -> ValueError:
        return ValueError(f"{self._path or 'the layout of rows'} is damaged: got {what}; delete it, it is made again")

    @property
    def rows(self) -> int:
        """R."""
        return int(self._first_row[-1])

    def read(self, index: Ints) -> tuple[Ints, Ints, Ints]:
        """Pieces of each row [N], and of all of them, row by row, document and first token in it [P].

        The first token of a document that `fill` repeats is given as -1.
        """
        windows = np.searchsorted(self._first_row, index, side="right") - 1
        per_row = np.empty(len(index), dtype=np.int64)
        first = np.empty(len(index), dtype=np.int64)
        for window in np.unique(windows).tolist():
            chosen = np.flatnonzero(windows == window)
            edges, place = self._window(window)[0], index[chosen] - self._first_row[window]
            first[chosen] = edges[place]
            per_row[chosen] = edges[place + 1] - edges[place]
        # Piece by piece: where it stands in its window.
        place = np.arange(int(per_row.sum())) + np.repeat(first - np.cumsum(per_row) + per_row, per_row)
        owner = np.repeat(windows, per_row)
        documents, begins = np.empty_like(place), np.empty_like(place)
        for window in np.unique(windows).tolist():
            chosen = np.flatnonzero(owner == window)
            _, document, begin = self._window(window)
            documents[chosen], begins[chosen] = document[place[chosen]], begin[place[chosen]]
        return per_row, documents, begins

    def _window(self, window: int) -> tuple[Ints, Ints, Ints]:
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        try:
            batch = self._reader.get_batch(window)
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise self._damaged(error) from None
        window_arrays = tuple(array.to_numpy() for array in (batch[0].offsets, batch[0].values, batch[1].values))
        if (
            len(window_arrays[1]) != len(window_arrays[2])
            or not ((window_arrays[1] >= 0) & (window_arrays[1] < self._offsets.documents)).all()
        ):
            raise self._damaged("documents that the token store does not have")
        self._windows[window] = window_arrays  # type: ignore[assignment]
        if len(self._windows) > _MAPPED_WINDOWS:
            self._windows.popitem(last=False)
        return self._windows[window]


def _make(sink: Any, settings: PlanSettings, offsets: Offsets) -> None:
    from tqdm import tqdm

    bar = tqdm(total=offsets.tokens, desc="packing", unit=" tokens", unit_scale=True, delay=5.0)
    with pa.ipc.new_file(sink, _SCHEMA) as writer, bar:
        for start, stop in windows(offsets):
            items = items_of(offsets, start, stop, settings)
            edges, *values = _columns(items, settings.packing.lay_out(items, settings.room))
            columns = [pa.LargeListArray.from_arrays(pa.array(edges), pa.array(column)) for column in values]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            bar.update(int(offsets[np.array([start, stop])] @ [-1, 1]))


def _columns(items: Items, laid: Laid) -> tuple[Ints, Ints, Ints]:
    """What is kept of a window: pieces before each row [R + 1], and of each piece document and first token [P]."""
    edges = np.concatenate([[0], np.cumsum(laid.per_row)])
    return edges, items.document[laid.piece], np.where(laid.repeated, -1, items.begin[laid.piece])


def windows(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """Ranges of documents that are laid out together: a function of the documents' lengths alone."""
    start = 0
    while start < offsets.documents:
        last = int(offsets[np.array([start])][0]) + _WINDOW_TOKENS - 1
        inside = int(offsets.find(np.array([last]))[0]) if last < offsets.tokens else offsets.documents
        stop = min(max(inside, start + 1), start + _WINDOW_DOCUMENTS, offsets.documents)
        yield start, stop
        start = stop


def items_of(offsets: Offsets, start: int, stop: int, settings: PlanSettings) -> Items:
    """The items of documents `start` to `stop`."""
    lengths = np.diff(offsets[start : stop + 1]) + settings.extras
    room, document = settings.room, np.arange(start, stop)
    if settings.strategy.overflow == "truncate":
        kept = lengths > 0
        document, lengths = document[kept], lengths[kept]
        return Items(document, np.zeros_like(document), np.minimum(lengths, room))
    parts = -(-lengths // room)  # none of a document without a token
    owner = np.repeat(np.arange(len(document)), parts)
    begin = (np.arange(len(owner)) - (np.cumsum(parts) - parts)[owner]) * room
    return Items(document[owner], begin, np.minimum(lengths[owner] - begin, room))
