"""Best-fit packing (arXiv 2404.10830): each item is put into the row in which it leaves least room.

From the longest item to the shortest. Items of equal length are interchangeable, so whole classes of them are placed
at once: the work depends on the row length, hardly on the number of documents. With `fill: crop` it is best fit
from a buffer instead: of the waiting items the longest that still fits is taken, and where none fits the
shortest is cropped, so that rows are full (the loader of nanochat, whose rows all begin at a document's start).
"""

from bisect import bisect_right, insort

import numpy as np

from sinkbed.data.pack.methods import PACKINGS, Ints, Items, Laid, Packing

_WAITING = 1000  # items in the buffer of `fill: crop`


@PACKINGS.register("best_fit")
class BestFit(Packing):
    """Whole documents; `fill` says what stands where none fits."""

    fills = ("pad", "crop", "repeat")

    def lay_out(self, items: Items, room: int) -> Laid:
        """Items of a row stand in store order."""
        if self.fill == "crop":
            return _best_fit_from_buffer(items.length, room)
        row = best_fit(items.length, room)
        laid = Laid(np.bincount(row).astype(np.int64), np.argsort(row, kind="stable"))
        return laid if self.fill == "pad" else _repeat(laid, items, room)


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

    def put(room_left: int, chosen: Ints) -> None:
        nonlocal present
        if room_left and len(chosen):
            free.setdefault(room_left, []).append(chosen)
            present |= 1 << room_left

    for size, count in zip((-sizes).tolist(), counts.tolist(), strict=True):
        items = order[first : first + count]
        first += count
        while len(items):
            fitting = present >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1
                chosen = np.concatenate(free.pop(left))
                present &= ~(1 << left)
            else:
                left = room
                chosen = np.arange(rows, rows + -(-len(items) // (room // size)))
                rows += len(chosen)
            each = left // size  # a row stays the best fit until nothing of this size fits
            full, rest = divmod(min(len(items), each * len(chosen)), each)
            used = np.repeat(chosen[: full + 1], each)[: full * each + rest]
            row[items[: len(used)]] = used
            items = items[len(used) :]
            put(left - each * size, chosen[:full])
            if rest:
                put(left - rest * size, chosen[full : full + 1])
            put(left, chosen[full + bool(rest) :])
    return row


def _best_fit_from_buffer(lengths: Ints, room: int) -> Laid:
    """The longest waiting item that fits, again and again; where none fits, the head of the shortest."""
    # One integer an item: its length, then how early it came. The largest is the longest, of these the first.
    keys = ((lengths << 32) + (2**32 - 1 - np.arange(len(lengths)))).tolist()
    waiting = sorted(keys[:_WAITING])
    following = iter(keys[_WAITING:])
    per_row, piece = [], []
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
        per_row.append(count)
    return Laid(np.array(per_row, dtype=np.int64), np.array(piece, dtype=np.int64))


def _repeat(laid: Laid, items: Items, room: int) -> Laid:
    """Fill each row with the beginnings of documents, in turn from the first of the window on."""
    edges = np.concatenate([[0], np.cumsum(laid.per_row)])
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
    return Laid(laid.per_row + np.bincount(where, minlength=len(laid.per_row)).astype(np.int64), piece, repeated)
