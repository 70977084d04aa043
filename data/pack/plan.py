"""Plan: which documents share a row, for every packing that keeps documents whole.

Documents are taken in windows of bounded size, in store order, and each window is laid out by itself: memory
does not grow with the corpus, and windows do not depend on shards. What is laid out are items: a document with its
markers, or, of one longer than a row, its pieces of row length and a rest.

`best_fit` is best-fit decreasing (arXiv 2404.10830): from the longest item to the shortest, each is put into the
row in which it leaves least room. Items of equal length are interchangeable, so whole classes of them are placed
at once: the work depends on the row length, hardly on the number of documents. With `fill: crop` it is best fit
from a buffer instead: of the waiting items the longest that still fits is taken, and where none fits the
shortest is cropped, so that rows are full (the loader of nanochat, whose rows all begin at a document's start).

A plan is kept beside the token store, as an Arrow file of one record batch a window and one record a row, and
mapped into memory. Where it cannot be written it is made anew in each process.

Shapes: R rows, N rows asked for, I items, P pieces.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sinkbed.data.files import sha256_json
from sinkbed.data.pack.strategy import Strategy
from sinkbed.data.store.offsets import Offsets

Ints = NDArray[np.int64]

FORMAT = 1
_WINDOW_TOKENS = 2**26
_WINDOW_DOCUMENTS = 2**20
_WAITING = 1000  # items in the buffer of `fill: crop`
_MAPPED_WINDOWS = 256
_SCHEMA = pa.schema([(name, pa.large_list(pa.int64())) for name in ("documents", "begins")])


class Items(NamedTuple):
    """What is laid out, in store order; every array is [I]."""

    document: Ints
    begin: Ints
    """First token in its document, markers counted."""
    length: Ints
    """Tokens, at most the room of a row."""


class Laid(NamedTuple):
    """Rows of a window."""

    held: Ints
    """[R] pieces of each row."""
    piece: Ints
    """[P] items, row by row."""
    repeated: NDArray[np.bool_] | bool = False
    """[P] which of them stand elsewhere too."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a plan."""

    strategy: Strategy
    room: int
    """Tokens of documents that a row holds."""
    extras: int
    """Tokens added to each document."""

    def key(self, digest: str) -> str:
        """A name for the plan of the split with this digest."""
        s = self.strategy
        parts = [FORMAT, digest, s.packing, s.long_documents, s.fill, self.room, self.extras]
        return f"{s.packing}-{self.room}-{sha256_json(parts)[:16]}"


class Plan:
    """The rows of a split, read window by window from its file or from memory."""

    def __init__(self, recipe: Recipe, offsets: Offsets, source: pa.NativeFile, path: Path | None = None) -> None:
        self._recipe, self._offsets, self._path = recipe, offsets, path
        self._reader = pa.ipc.open_file(source)
        if self._reader.schema != _SCHEMA:
            raise pa.ArrowInvalid(f"found the columns {self._reader.schema.names}")
        counts = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        self._first_row = np.cumsum([0, *counts], dtype=np.int64)
        self._windows: OrderedDict[int, tuple[Ints, Ints, Ints]] = OrderedDict()

    @classmethod
    def load(cls, recipe: Recipe, offsets: Offsets, folder: Path, digest: str) -> Plan:
        """The plan of the split with this digest: mapped from `folder`, where it is made first if need be."""
        path = folder / f"{recipe.key(digest)}.arrow"
        try:
            for attempt in range(2):
                if attempt or not path.is_file():
                    _write(path, recipe, offsets)
                try:
                    return cls(recipe, offsets, pa.memory_map(os.fspath(path)), path)
                except (pa.ArrowException, LookupError, OSError, ValueError) as error:
                    if getattr(error, "errno", None):
                        raise  # else damaged: what it held can be made again
        except OSError as error:  # a read-only or a full disk
            warnings.warn(
                f"{path}: the layout of rows could not be kept ({error}); every process lays it out anew, in its own "
                "memory. Make that folder writable, or prepare a store of your own",
                stacklevel=2,
            )
        sink = pa.BufferOutputStream()
        _make(sink, recipe, offsets)
        return cls(recipe, offsets, pa.BufferReader(sink.getvalue()))

    def verify(self) -> None:
        """Lay out everything again and compare. Raises ValueError that names a damaged file."""
        for number, (start, stop) in enumerate(windows(self._offsets)):
            items = items_of(self._offsets, start, stop, self._recipe)
            expected = _columns(items, lay_out(items, self._recipe))
            if not all(np.array_equal(a, b) for a, b in zip(self._window(number), expected, strict=True)):
                raise self._damaged("other documents in its rows than the token store gives")

    def _damaged(self, what: object) -> ValueError:
        return ValueError(f"{self._path or 'the layout of rows'} is damaged: found {what}; delete it, it is made again")

    @property
    def rows(self) -> int:
        """R."""
        return int(self._first_row[-1])

    def read(self, index: Ints) -> tuple[Ints, Ints, Ints]:
        """Pieces of each row [N], and of all of them, row by row, document and first token in it [P].

        The first token of a document that `fill` repeats is given as -1.
        """
        windows = np.searchsorted(self._first_row, index, side="right") - 1
        held = np.empty(len(index), dtype=np.int64)
        first = np.empty(len(index), dtype=np.int64)
        for window in np.unique(windows).tolist():
            chosen = np.flatnonzero(windows == window)
            edges, place = self._window(window)[0], index[chosen] - self._first_row[window]
            first[chosen] = edges[place]
            held[chosen] = edges[place + 1] - edges[place]
        # Piece by piece: where it stands in its window.
        place = np.arange(int(held.sum())) + np.repeat(first - np.cumsum(held) + held, held)
        owner = np.repeat(windows, held)
        documents, begins = np.empty_like(place), np.empty_like(place)
        for window in np.unique(windows).tolist():
            chosen = np.flatnonzero(owner == window)
            _, document, begin = self._window(window)
            documents[chosen], begins[chosen] = document[place[chosen]], begin[place[chosen]]
        return held, documents, begins

    def _window(self, window: int) -> tuple[Ints, Ints, Ints]:
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        try:
            batch = self._reader.get_batch(window)
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise self._damaged(error) from None
        found = tuple(array.to_numpy() for array in (batch[0].offsets, batch[0].values, batch[1].values))
        if len(found[1]) != len(found[2]) or not ((found[1] >= 0) & (found[1] < self._offsets.documents)).all():
            raise self._damaged("documents that the token store does not have")
        self._windows[window] = found  # type: ignore[assignment]
        if len(self._windows) > _MAPPED_WINDOWS:
            self._windows.popitem(last=False)
        return self._windows[window]


def _write(path: Path, recipe: Recipe, offsets: Offsets) -> None:
    """Make the plan under a name of this process's own, then give it its name: others do the same and agree."""
    path.parent.mkdir(exist_ok=True, parents=True)
    aside = path.with_name(f".{path.stem}.{os.urandom(8).hex()}")
    try:
        with open(aside, "xb") as file:
            _make(file, recipe, offsets)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _make(sink: Any, recipe: Recipe, offsets: Offsets) -> None:
    from tqdm import tqdm

    bar = tqdm(total=offsets.tokens, desc="packing", unit=" tokens", unit_scale=True, delay=5.0)
    with pa.ipc.new_file(sink, _SCHEMA) as writer, bar:
        for start, stop in windows(offsets):
            items = items_of(offsets, start, stop, recipe)
            edges, *values = _columns(items, lay_out(items, recipe))
            columns = [pa.LargeListArray.from_arrays(pa.array(edges), pa.array(column)) for column in values]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            bar.update(int(offsets[np.array([start, stop])] @ [-1, 1]))


def _columns(items: Items, laid: Laid) -> tuple[Ints, Ints, Ints]:
    """What is kept of a window: pieces before each row [R + 1], and of each piece document and first token [P]."""
    edges = np.concatenate([[0], np.cumsum(laid.held)])
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


def items_of(offsets: Offsets, start: int, stop: int, recipe: Recipe) -> Items:
    """The items of documents `start` to `stop`."""
    lengths = np.diff(offsets[start : stop + 1]) + recipe.extras
    room, document = recipe.room, np.arange(start, stop)
    if recipe.strategy.long_documents == "crop":
        kept = lengths > 0
        document, lengths = document[kept], lengths[kept]
        return Items(document, np.zeros_like(document), np.minimum(lengths, room))
    parts = -(-lengths // room)  # none of a document without a token
    owner = np.repeat(np.arange(len(document)), parts)
    begin = (np.arange(len(owner)) - (np.cumsum(parts) - parts)[owner]) * room
    return Items(document[owner], begin, np.minimum(lengths[owner] - begin, room))


def lay_out(items: Items, recipe: Recipe) -> Laid:
    """Items to rows. Every item stands in one row, but for those that `fill` crops or repeats."""
    room, strategy = recipe.room, recipe.strategy
    if strategy.packing == "pad":
        return Laid(np.ones_like(items.length), np.arange(len(items.length)))
    if strategy.packing == "grouped":
        return _grouped(items.length, room)
    if strategy.fill == "crop":
        return _best_fit_from_buffer(items.length, room)
    laid = _of_rows(best_fit(items.length, room))
    return laid if strategy.fill == "pad" else _repeat(laid, items, room)


def _of_rows(row: Ints) -> Laid:
    """From the row of each item; items of a row stand in store order."""
    return Laid(np.bincount(row).astype(np.int64), np.argsort(row, kind="stable"))


def best_fit(lengths: Ints, room: int) -> Ints:
    """Best-fit decreasing: the row of each item [I].

    Of several rows with the least sufficient room the one that came to have it first is taken, of several items
    of one length the first in store order.
    """
    row = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(-lengths, return_counts=True)
    free: dict[int, list[Ints]] = {}  # rows by room that is left
    present = 0  # bit r: there are rows with room r
    rows = first = 0

    def put(room_left: int, some: Ints) -> None:
        nonlocal present
        if room_left and len(some):
            free.setdefault(room_left, []).append(some)
            present |= 1 << room_left

    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        items = order[first : first + count]
        first += count
        while len(items):
            fitting = present >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1
                some = np.concatenate(free.pop(left))
                present &= ~(1 << left)
            else:
                left = room
                some = np.arange(rows, rows + -(-len(items) // (room // size)))
                rows += len(some)
            each = left // size  # a row stays the best fit until nothing of this size fits
            whole, rest = divmod(min(len(items), each * len(some)), each)
            used = np.repeat(some[: whole + 1], each)[: whole * each + rest]
            row[items[: len(used)]] = used
            items = items[len(used) :]
            put(left - each * size, some[:whole])
            if rest:
                put(left - rest * size, some[whole : whole + 1])
            put(left, some[whole + bool(rest) :])
    return row


def _best_fit_from_buffer(lengths: Ints, room: int) -> Laid:
    """The longest waiting item that fits, again and again; where none fits, the head of the shortest."""
    # One integer an item: its length, then how early it came. The largest is the longest, of these the first.
    keys = ((lengths << 32) + (2**32 - 1 - np.arange(len(lengths)))).tolist()
    waiting = sorted(keys[:_WAITING])
    following = iter(keys[_WAITING:])
    held, piece = [], []
    while waiting:
        left, count = room, 0
        while left and waiting:
            at = bisect_right(waiting, (left + 1) << 32) - 1
            # Cropped is the shortest, of these the first: the last of the keys with its length.
            key = waiting.pop(at if at >= 0 else bisect_right(waiting, ((waiting[0] >> 32) + 1) << 32) - 1)
            left = max(0, left - (key >> 32))
            piece.append(2**32 - 1 - (key & (2**32 - 1)))
            count += 1
            if (more := next(following, None)) is not None:
                insort(waiting, more)
        held.append(count)
    return Laid(np.array(held, dtype=np.int64), np.array(piece, dtype=np.int64))


def _grouped(lengths: Ints, room: int) -> Laid:
    """Items by length, from the shortest; each row takes the next ones while they fit."""
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order]).tolist()
    held, first, filled = [], 0, 0
    while first < len(ends):
        beyond = bisect_right(ends, filled + room)
        held.append(beyond - first)
        first, filled = beyond, ends[beyond - 1]
    return Laid(np.array(held, dtype=np.int64), order)


def _repeat(laid: Laid, items: Items, room: int) -> Laid:
    """Fill each row with the beginnings of documents, in turn from the first of the window on."""
    edges = np.concatenate([[0], np.cumsum(laid.held)])
    left = room - np.add.reduceat(items.length[laid.piece], edges[:-1])
    starts = np.flatnonzero(items.begin == 0)
    lengths = items.length[starts].tolist()
    at, where, what = 0, [], []
    for row in np.flatnonzero(left).tolist():
        gap = int(left[row])
        while gap > 0:
            where.append(row)
            what.append(at)
            gap -= lengths[at]
            at = (at + 1) % len(lengths)
    ends = edges[1:][where]
    piece = np.insert(laid.piece, ends, starts[what])
    repeated = np.insert(np.zeros(len(laid.piece), dtype=np.bool_), ends, True)
    return Laid(laid.held + np.bincount(where, minlength=len(laid.held)).astype(np.int64), piece, repeated)
