"""Documents of about the same length share a row."""

from bisect import bisect_right

import numpy as np

from sinkbed.data.pack.methods import PACKINGS, Items, Laid, Packing


@PACKINGS.register("grouped")
class Grouped(Packing):
    """Items by length, from the shortest; each row takes the next ones while they fit."""

    def lay_out(self, items: Items, room: int) -> Laid:
        order = np.argsort(items.length, kind="stable")
        ends = np.cumsum(items.length[order]).tolist()
        per_row, first, filled = [], 0, 0
        while first < len(ends):
            beyond = bisect_right(ends, filled + room)
            per_row.append(beyond - first)
            first, filled = beyond, ends[beyond - 1]
        return Laid(np.array(per_row, dtype=np.int64), order)
