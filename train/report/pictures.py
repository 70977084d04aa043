"""The pictures of a study: its result, curves, losses, states, mixing, and where the sink sits."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes

from sinkbed.train.measure.measures import Group, measures
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.effects import LABELS, MIXING, curve, figures, reference_mode
from sinkbed.train.report.figures import (
    COLOURS,
    INK,
    LINE,
    MARKERS,
    MODE_LOOKS,
    Panel,
    Picture,
    heat,
    line,
    look,
    mass_scale,
    mode_panels,
    named_rows,
    short,
    stacked,
    token_axis,
)
from sinkbed.train.report.intervals import Interval
from sinkbed.train.report.result import Result, arms_of, modes_of

FEWEST_FOR_A_BAND = 4
"""Seeds from which on an interval is drawn; of fewer it is so wide that it hides the lines."""
_MOST_MARKED = 24
"""Arms up to which curves have markers."""
_ONE_MARK = "Every seed is a mark, the mean of several a bar."
_RESULT_WORDS = (
    f"{_ONE_MARK} Sink rate: share of (document, layer, head) whose mean attention on the first key is above 0.3. Loss "
    "gap: what the loss gains where the model reads another input than with BOS."
)
_AGAINST_SINK_WORDS = (
    "Every run, at each point of training after its start where both were measured. A colour is an arm, a marker an "
    "input: {}. That the two go together does not say that one makes the other: both come with training."
)
_HEAT_WORDS = (
    "Mean attention on the first key (sink mass), first seed. By head: after training, a block of layers an arm, "
    "layers down from the first, heads across. By layer: mean over heads while training."
)


def pictures(results: Sequence[Result], curves: Sequence[Result]) -> list[Picture]:
    """Those that there is something for, the result first; `curves` are of the runs that are not finished too."""
    measured = {key.rpartition("/")[2] for r in curves for p in r.points for key in p if key.startswith("sink/mass/")}
    live = [mode for mode in (reference_mode(measured), "text") if mode and mode in measured]
    words = "Measured on fewer documents than the final figures. Tokens on a logarithmic axis."
    seeds = max(sum(r.arm == arm for r in curves) for arm in arms_of(curves))
    if seeds >= FEWEST_FOR_A_BAND:
        words = f"Shaded: 95 % interval of the mean. {words}"
    elif seeds > 1:
        words = f"Thin: a seed each; thick: their mean. {words}"

    def panels(title: str, key: str, modes: Sequence[str] = live) -> list[Panel]:
        return _curve_panels(curves, title, key, modes)

    every = [
        Picture("result", "Sink rate, and what leaving BOS out costs", _RESULT_WORDS, _result(results), across=2),
        Picture(
            "curves", "While training", words,
            panels("sink rate, %", "sink/rate_eps0.3/{mode}") + panels("sink mass", "sink/mass/{mode}"), across=2,
        ),
        Picture(
            "loss", "Losses", words,
            panels("validation loss", "val/loss/{mode}") + panels("training loss", "train/loss", [""]),
        ),
        Picture(
            "final_loss", "Loss by input", _ONE_MARK,
            dots(results, "loss", modes_of(results), "validation loss, nats per token"),
        ),
        Picture("heatmaps", "Where the sink sits", _HEAT_WORDS, _heat_panels(results, live), across=2),
    ]  # fmt: skip
    for group in get_args(Group) if live else ():
        columns = [c for measure in measures(group).values() for c in measure.columns if c.log]
        of_group = [panel for c in columns for panel in panels(c.title, c.log, live[:1])]
        note = f"Input: {MODE_LABELS[live[0]]}. Of what every layer has, the mean over layers. {words}"
        every.append(Picture(group, group.capitalize(), note, of_group))
    # Where key 0 is hidden there is no attention on it.
    modes = [mode for mode in modes_of(curves) if mode in measured and mode != "first_key_masked"]
    words = _AGAINST_SINK_WORDS.format(", ".join(f"{MARKERS[MODE_LOOKS[m][1]]} {MODE_LABELS[m]}" for m in modes))
    every.append(Picture("mixing_sink", "Mixing against the sink", words, _against_sink(curves, modes)))
    return [picture for picture in every if picture.panels]


def _result(results: Sequence[Result]) -> list[Panel]:
    modes = modes_of(results)
    reference = reference_mode(modes)
    # Where key 0 is hidden there is no attention on it.
    panels = dots(results, "sink_rate_0.3", [m for m in modes if m != "first_key_masked"], "sink rate, % (eps 0.3)")
    if reference is not None:
        axis = f"loss − loss({MODE_LABELS[reference]}), nats per token"
        panels += dots(results, "loss_gap", [m for m in modes if m != reference], axis)
    return panels


def dots(results: Sequence[Result], metric: str, modes: Sequence[str], xlabel: str) -> list[Panel]:
    """A row an arm: every seed a mark in the look of its mode."""
    arms = arms_of(results)
    by_mode = {mode: [list(figures(results, arm, metric, mode).values()) for arm in arms] for mode in modes}
    by_mode = {mode: rows for mode, rows in by_mode.items() if any(rows)}

    def draw(axis: Axes) -> None:
        for n, (mode, rows) in enumerate(by_mode.items()):
            colour, marker = MODE_LOOKS[mode]
            style: dict[str, Any] = {"color": colour, "gid": f"series:{MODE_LABELS[mode]}"}
            offset = (n - (len(by_mode) - 1) / 2) * 0.8 / len(by_mode)
            marks = [(value, row + offset) for row, values in enumerate(rows) for value in values]
            size, alpha = (5, 1) if max(map(len, rows)) == 1 else (3.5, 0.6)
            axis.plot(*zip(*marks, strict=True), marker, label=MODE_LABELS[mode], markersize=size, alpha=alpha, **style)
            means = [(np.mean(values), row + offset) for row, values in enumerate(rows) if len(values) > 1]
            if means:
                axis.plot(*zip(*means, strict=True), "|", markersize=8, markeredgewidth=2, **style)
        named_rows(axis, arms)
        axis.set(ylim=(len(arms) - 0.5, -0.5), xlabel=xlabel)
        axis.grid(axis="x")
        for row in range(len(arms) - 1):
            axis.axhline(row + 0.5, color=LINE, linewidth=0.6)
        if metric not in ("loss", "bits_per_byte"):
            axis.axvline(0, color=INK, linewidth=0.8)

    return [Panel(LABELS[metric].replace(" %", ""), draw, 0.9 + 0.34 * len(arms))] if by_mode else []


def _against_sink(results: Sequence[Result], modes: Sequence[str]) -> list[Panel]:
    """Each figure of mixing against the sink mass of the same point of training."""
    panels = []
    for metric in MIXING:
        marks: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for r, mode in product(results, modes):
            mass = curve(r, "sink_mass_excess", mode)
            if pairs := [(mass[t], y) for t, y in curve(r, metric, mode).items() if t > 0 and t in mass]:
                marks.setdefault((r.arm, mode), []).extend(pairs)
        if marks:
            panels.append(Panel(LABELS[metric], partial(_scatter, arms_of(results), marks)))
    return panels


def _scatter(arms: Sequence[str], marks: dict[tuple[str, str], list[tuple[float, float]]], axis: Axes) -> None:
    """An arm a colour, a mode a marker."""
    second = set(arms[len(COLOURS) :])  # whose colours others have too: hollow, and dashed in the legend
    for arm in dict.fromkeys(arm for arm, _ in marks):  # for the legend: a marker is a mode here
        line(axis, [], [], arm, look(arms.index(arm)), marker="", linestyle="--" if arm in second else "-")
    for (arm, mode), pairs in marks.items():
        colour, gid = look(arms.index(arm))[0], f"series:{arm}"
        options: dict[str, Any] = {"fillstyle": "none" if arm in second else "full", "markersize": 4, "alpha": 0.6}
        axis.plot(*zip(*pairs, strict=True), MODE_LOOKS[mode][1], color=colour, gid=gid, **options)
    axis.set(xlabel="sink mass")
    axis.grid()


Runs = Sequence[dict[float, float]]
"""Of each run tokens -> value."""


def _curve_panels(results: Sequence[Result], title: str, key: str, modes: Sequence[str]) -> list[Panel]:
    """A panel a mode on one scale: an arm a line."""
    by_mode = {mode: _series(results, key, mode) for mode in modes}
    by_mode = {mode: arms for mode, arms in by_mode.items() if any(arms.values())}
    values = [value for arms in by_mode.values() for runs in arms.values() for value in _extent(runs)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    margin = 0.06 * (high - low)

    def draw(arms: dict[str, Runs], axis: Axes) -> None:
        for n, (arm, runs) in enumerate(arms.items()):
            _draw_arm(axis, arm, runs, look(n), marked=len(arms) <= _MOST_MARKED)
        token_axis(axis, [t for runs in arms.values() for run in runs for t in run])
        axis.grid(axis="y")
        if len(by_mode) > 1 and margin:
            axis.set_ylim(low - margin if low else 0, high + margin)

    if len(modes) == 1:
        return [Panel(title, partial(draw, arms)) for arms in by_mode.values()]
    return mode_panels(by_mode, draw, f"{title}: {{}}")


def _series(results: Sequence[Result], key: str, mode: str) -> dict[str, Runs]:
    """Of each arm's runs, the mean over layers where the key names one."""
    arms: dict[str, list[dict[float, float]]] = {}
    for r in results:
        layers = max(len(measured["mass"]) for measured in r.final["modes"].values())
        names = dict.fromkeys(key.format(mode=mode, layer=layer) for layer in range(layers))
        points = [(p["train/tokens"], [p[name] for name in names if p.get(name) is not None]) for p in r.points]
        run = {tokens: fmean(values) for tokens, values in points if values}
        arms.setdefault(r.arm, []).extend([run] if run else [])
    return {**arms}


def _furthest(runs: Runs) -> Runs:
    """Those that have gone as far as any: one that has just begun must not cut the others' mean."""
    end = max(map(max, runs), default=0)
    return [run for run in runs if max(run) == end]


def _mean(runs: Runs) -> tuple[list[float], list[Interval]]:
    """Tokens that every run of `_furthest` was measured at, and the interval over these."""
    runs = _furthest(runs)
    tokens = sorted(set.intersection(*map(set, runs))) if runs else []
    return tokens, [Interval.of([run[t] for run in runs]) for t in tokens]


def _extent(runs: Runs) -> list[float]:
    """The values that an axis must reach: of few runs each, of many their means."""
    if len(runs) >= FEWEST_FOR_A_BAND:
        return [value.mean for value in _mean(runs)[1]]
    return [value for run in runs for value in run.values()]


def _draw_arm(axis: Axes, arm: str, runs: Runs, look: tuple[str, str], *, marked: bool) -> None:
    tokens, values = _mean(runs)
    if not tokens:
        return
    colour, gid, whole = look[0], f"series:{arm}", _furthest(runs)
    banded = len(whole) >= FEWEST_FOR_A_BAND
    if banded:
        low, high = [v.low for v in values], [v.high for v in values]
        axis.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0, gid=gid)
    for run in runs if len(runs) > 1 else ():
        if not (banded and run in whole):
            axis.plot(list(run), list(run.values()), color=colour, alpha=0.5, linewidth=0.6, gid=gid)
    line(axis, tokens, [v.mean for v in values], arm, look, **({} if marked else {"marker": "", "linewidth": 0.8}))


def _heat_panels(results: Sequence[Result], live: Sequence[str]) -> list[Panel]:
    """Mass by head after training, a panel a mode; and by layer while training."""
    first = {arm: next(r for r in results if r.arm == arm) for arm in arms_of(results)}
    by_head = {
        mode: {arm: r.final["modes"][mode]["mass"] for arm, r in first.items() if mode in r.final["modes"]}
        for mode in modes_of(results)
        if mode != "first_key_masked"
    }
    heads = max((len(layer) for maps in by_head.values() for mass in maps.values() for layer in mass), default=1)
    panels = _stacks("by head, after training", by_head, "head", {n: str(n) for n in range(0, heads, -(-heads // 8))})
    times = [t for r in first.values() for mode in live for t in r.maps(mode) if t > 0]
    if len(set(times)) < 2:
        return panels
    grid = np.geomspace(min(times), max(times), 40)
    by_layer = {
        mode: {arm: _over_time(maps, grid) for arm, r in first.items() if (maps := r.maps(mode))} for mode in live
    }
    ticks = {n: short(grid[n]) for n in range(0, len(grid), 13)}
    return panels + _stacks("by layer, while training", by_layer, "tokens seen", ticks)


def _over_time(maps: dict[int, list[list[float]]], grid: np.ndarray) -> np.ndarray:
    """[L, times]: mean over heads at the last measurement before each time."""
    times = sorted(maps)
    at = np.maximum(np.searchsorted(times, grid * (1 + 1e-9), side="right") - 1, 0)
    return np.array([np.mean(maps[times[index]], axis=1) for index in at]).T


def _stacks(what: str, by_mode: dict[str, dict[str, Any]], xlabel: str, ticks: dict[int, str]) -> list[Panel]:
    """A panel a mode: a map an arm that was measured in it, under each other, on one scale."""
    by_mode = {mode: maps for mode, maps in by_mode.items() if maps}
    top = mass_scale([values for maps in by_mode.values() for values in maps.values()])

    def draw(maps: dict[str, Any], axis: Axes) -> None:
        values, middles = stacked(maps)
        heat(axis, values, "sink mass", top)
        named_rows(axis, list(maps), middles)
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.set(xlabel=xlabel, ylabel="layers of an arm, downwards")
        axis.spines[:].set_visible(False)

    rows = max((sum(len(values) + 1 for values in maps.values()) for maps in by_mode.values()), default=0)
    return mode_panels(by_mode, draw, f"{{}}, {what}", height=1.2 + 0.13 * rows)
