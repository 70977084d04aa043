"""The tables of a report beside its first one: effects, arms, differences of arms; and all numbers as files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.effects import DIGITS, LABELS, Found, figure, figures, reference_mode, same_documents
from train.report import MODE_LABELS, Result, Section, spread, to_csv
from train.rundir import write_atomic
from train.statistics import Interval, paired

_MOST_PAIRS = 60


def sections(results: Sequence[Result], found: Sequence[Found]) -> list[Section]:
    """Effects, arms and differences, each where there is something to say."""
    parts = [_effects(found)] if found else []
    parts.append(_arms(results))
    pairs = _pairs(results)
    return parts + ([pairs] if pairs is not None else [])


def _effects(found: Sequence[Found]) -> Section:
    lines = [item.columns() for item in found]
    # The verdict is what is read first.
    order = ("effect", "verdict", *(name for name in lines[0] if name not in ("effect", "verdict")))
    header = tuple(name for name in order if any(line[name] for line in lines))
    counts = {v: sum(item.verdict == v for item in found) for v in dict.fromkeys(item.verdict for item in found)}
    return Section(
        "Expected effects",
        header,
        [tuple(line[name] for name in header) for line in lines],
        f"{'; '.join(f'{count} {verdict}' for verdict, count in counts.items())}. A verdict is on the mean difference "
        "of arms on the same documents (one store), paired by seed. Reproduced: its 95 % interval lies on the expected "
        "side of 0 (for the same: inside the tolerance). Not reproduced: it lies on another side. Within noise: it "
        "reaches both. One comparison in twenty leaves 0 out by chance.",
    )


def _modes(results: Sequence[Result]) -> list[str]:
    """Inference modes of all runs, the one with the first token first, then text."""
    modes = [m for m in results[0].final["modes"] if all(m in r.final["modes"] for r in results)]
    return (
        sorted(modes, key=lambda m: {"bos": 0, "as_trained": 0, "text": 1}.get(m, 2))
        or list(results[0].final["modes"])[:1]
    )


def _arms(results: Sequence[Result]) -> Section:
    mode = _modes(results)[0]
    header = ("arm", "runs", f"{LABELS['sink_rate_area']}, {MODE_LABELS[mode]}", "onset, thousand tokens", "reached")
    cells: list[tuple[str, ...]] = []
    for arm in dict.fromkeys(r.arm for r in results):
        of_arm = [r for r in results if r.arm == arm]
        onsets = [v / 1000 for r in of_arm if (v := figure(r, "onset_tokens", mode)) is not None]
        areas = list(figures(results, arm, "sink_rate_area", mode).values())
        reached = f"{len(onsets)} of {len(of_arm)}"
        cells.append((arm, str(len(of_arm)), spread(areas, 1), spread(onsets, 0) or "never", reached))
    return Section(
        "When the sink forms",
        header,
        cells,
        "Area: mean of the sink rate during training over the logarithm of tokens. Onset: the first measurement of "
        "training at measure.onset_rate (default 10 %), over the runs that reached it.",
    )


def _pairs(results: Sequence[Result]) -> Section | None:
    """Paired differences of every two arms; those that exceed the noise are marked."""
    arms = list(dict.fromkeys(r.arm for r in results))
    modes = _modes(results)
    columns = [("sink_rate_0.3", modes[0]), ("sink_mass", modes[0]), ("loss", modes[0])]
    if "text" in modes and reference_mode(modes) is not None:
        columns.append(("loss_gap", "text"))
    if len(arms) < 2 or len({r.seed for r in results}) < 2:
        return None
    values = {(arm, c): figures(results, arm, *c) for arm in arms for c in columns}
    lines: list[tuple[bool, tuple[str, ...]]] = []
    for a, b in itertools.combinations(arms, 2):
        if not same_documents(results, a, b):
            continue
        found = [paired(values[a, c], values[b, c]) for c in columns]
        marked = [_marked(item, DIGITS.get(metric, 1)) for item, (metric, _) in zip(found, columns, strict=True)]
        lines.append((any(item.exceeds_noise() for item in found if item), (a, b, *marked)))
    shown = [line for _, line in lines]
    left_out = ""
    if len(shown) > _MOST_PAIRS:
        shown = [line for beyond, line in lines if beyond]
        left_out = f" Of {len(lines)} pairs, the {len(shown)} that have a difference beyond the noise are listed."
    header = ("arm", "minus", *(f"{LABELS[metric]}, {MODE_LABELS[mode]}" for metric, mode in columns))
    return Section(
        "Differences of arms",
        header,
        shown,
        "Mean difference of arms on the same documents (one store), paired by seed, ± half-width of its 95 % interval. "
        f"*: the interval leaves 0 out; of twenty differences that are none, one does so by chance.{left_out}",
    )


def _marked(found: Interval | None, digits: int) -> str:
    return spread(found, digits, sign=True) + (" *" if found is not None and found.exceeds_noise() else "")


def verdicts(found: Sequence[Found]) -> list[str]:
    """The effects for a terminal, a line each."""
    width = max(len(item.verdict) for item in found)
    lines = []
    for item in found:
        cells = item.columns()
        unit = "" if not cells["difference"] else f": {cells['figure']} {cells['difference']}"
        lines.append(f"{item.verdict:{width}}  {item.effect.name}{unit} (expected {cells['expected']})")
    return lines


def effects_csv(found: Sequence[Found]) -> str:
    """effects.csv."""
    rows = [item.record() for item in found]
    return to_csv(rows, tuple(rows[0]))


def write_parquet(results: Sequence[Result], rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """table.parquet, the rows of table.csv, and curves.parquet, every number measured or logged during training."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    points = [
        {"arm": r.arm, "seed": r.seed, **{k: v for k, v in point.items() if not isinstance(v, list)}}
        for r in results
        for point in r.points
    ]
    names = list(dict.fromkeys(name for point in points for name in point))
    curves = [{name: point.get(name) for name in names} for point in points]
    for name, content in (("table", list(rows)), ("curves", curves)):
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(content), buffer)
        write_atomic(folder / f"{name}.parquet", buffer.getvalue().to_pybytes())
