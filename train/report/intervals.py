"""Statistics of a study: what several seeds say about a figure, and about the difference of two arms.

Intervals are Student's t at 95 %, for one comparison at a time: for the mean of an arm over its seeds, and of the
differences of two arms under the same seed, which share the documents and, where they have as many rows, their order.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Student's t at 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_Z = 1.959964


def t_quantile(freedom: int) -> float:
    """Student's t at 97.5 % with so many degrees of freedom, to 4 decimals; raises ValueError below 1."""
    if freedom < 1:
        raise ValueError(f"t quantile: expected at least 1 degree of freedom, got {freedom}")
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Cornish and Fisher's expansion around the normal's (Abramowitz and Stegun, 26.7.5).
    z, n = _Z, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


@dataclass(frozen=True)
class Interval:
    """A mean over runs and the half-width of its 95 % interval; NaN where one run gives none."""

    mean: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """From the values of the runs. Raises ValueError where there is none."""
        if not values:
            raise ValueError("interval: expected at least one value, got none")
        if len(values) == 1:
            return cls(float(values[0]), math.nan, 1)
        half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
        return cls(fmean(values), half, len(values))

    @property
    def low(self) -> float:
        """Lower end; NaN for one run."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end; NaN for one run."""
        return self.mean + self.half

    def exceeds_noise(self) -> bool:
        """Whether the interval leaves 0 out; never for one run."""
        return self.low > 0 or self.high < 0


def seeds_for(half_width: float, seen: Interval) -> int:
    """About how many seeds give an interval of this half-width, if more vary as those of `seen`, at least two, do."""
    deviation = seen.half * math.sqrt(seen.count) / t_quantile(seen.count - 1)
    count = max(2, math.ceil((_Z * deviation / half_width) ** 2))  # too few by a handful: t is above its limit
    while t_quantile(count - 1) * deviation > half_width * math.sqrt(count):
        count += 1
    return count


def paired(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """The difference of two arms over the seeds that both have, `one` minus `other`; None without a common seed."""
    differences = [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]
    return Interval.of(differences) if differences else None


def verdict(difference: Interval | None, expected: str, tolerance: float = 0.0) -> str:
    """How a difference stands to what was expected (`up`, `down`, `none` within `tolerance`).

    `reproduced`, `not reproduced` (the interval lies on another side), `within noise` (it reaches both), `one run`
    with the direction, or `not measured`.
    """
    if difference is None or math.isnan(difference.mean):
        return "not measured"
    if difference.count == 1:
        size = abs(difference.mean)
        as_expected = {"none": size <= tolerance, "up": difference.mean > 0, "down": difference.mean < 0}[expected]
        return "one run: as expected" if as_expected else "one run: not as expected"
    if expected == "none":
        if -tolerance <= difference.low and difference.high <= tolerance:
            return "reproduced"
        return "not reproduced" if difference.low > tolerance or difference.high < -tolerance else "within noise"
    low, high = (difference.low, difference.high) if expected == "up" else (-difference.high, -difference.low)
    return "reproduced" if low > 0 else "not reproduced" if high < 0 else "within noise"


def area(points: Sequence[tuple[float, float]]) -> float | None:
    """Mean of a curve over the logarithm of its abscissa, by the trapezoidal rule, over the last hundredfold of it.

    `points` are (tokens, value) in order, from 0 tokens on, which have no logarithm: their value is that of where the
    hundredfold begins, if nothing was measured between. So runs are compared over the same stretch however many tokens
    their first step took. None where nothing was measured before the stretch or at its beginning, and below two points.
    """
    if not points or points[-1][0] <= 0:
        return None
    start = points[-1][0] / 100
    before = [(x, y) for x, y in points if x <= start]
    kept = [(math.log(x), y) for x, y in points if x > start]
    if not before or (before[-1][0] <= 0 and len(kept) < 2):
        return None
    x, y = before[-1]
    if x > 0:
        y += (kept[0][1] - y) * (math.log(start) - math.log(x)) / (kept[0][0] - math.log(x))
    kept.insert(0, (math.log(start), y))
    total = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(kept))
    return total / (kept[-1][0] - kept[0][0])
