"""Pictures of what `sinkbed probe` measured, for a paper, the page and W&B."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib.cm
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from sinkbed.train.measure.measures import Column, Group
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.figures import (
    MODE_LOOKS,
    Panel,
    Picture,
    drawable,
    heat,
    line,
    mass_scale,
    mode_panels,
    token_axis,
    whole_ticks,
)
from sinkbed.train.report.model_tables import ALONG, Measured, columns_of, last_layer, modes_of, note_of

Line = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Abscissas, values and their standard errors, where there are any."""


def pictures(measured: Measured) -> Iterator[Picture]:
    """Of everything that was measured."""
    change = measured.get("change", {})
    drawings: tuple[tuple[str, Any, Callable[[Any], list[Panel]], str, str], ...] = (
        ("sink_heads", measured.get("sinks", {}).get("natural"), _heads, "Where the sink sits",
         "Mean attention on the first key, layers down, heads across."),
        ("learned_key", measured.get("sinks", {}).get("natural"), partial(_heads, mass="learned_mass"),
         "Attention on the learned key", "Or on the registers; mean of the same queries, layers down, heads across."),
        ("attention", measured.get("map"), _map, "The strongest sink head",
         "Attention of the head with most mass on the first key in the first mode, and of the same head in the others; "
         "first document, queries down, keys across. Colours go by the square root."),
        ("norms", measured.get("states"), _norm, "Norms of the hidden states",
         "‖h‖ by position in the row; a line a layer, dark to bright with depth (in: what the first block reads)."),
        ("states", measured, partial(_by_depth, "states"), "The first token against the others",
         note_of(measured, "states")),
        ("change", change, lambda change: _change(change["modes"], change["text"]),
         f"One word changed: {change.get('old')} → {change.get('new')}",
         "Norm of the change of the hidden states, layers up, tokens across, on one scale (after Figure 2 of arXiv "
         "2504.02732)."),
        ("perturbation", measured.get("perturbation"), _change, "How far a changed token reaches",
         "Change of the hidden states over their mean norm after one token was replaced; mean over documents, layers "
         "up, text tokens across, on one scale; colours go by the square root."),
        ("mixing", measured, partial(_by_depth, "mixing"), "Mixing by depth", note_of(measured, "mixing")),
        ("by_length", measured.get("by_length"), _length, "Mixing by context length", "The last layer's figures."),
        ("positions", measured.get("positions"), _position, "Perplexity by position in the document",
         "Of the targets at these positions; perplexity on a logarithmic axis."),
        ("streaming", measured.get("streaming"), _streaming, "With a cache of keys",
         "Loss when a query sees the first k keys and the last ones of a cache of constant size; dashed: the keys seen "
         "in training."),
        ("checkpoints", measured.get("checkpoints"), _checkpoint, "Along the run's checkpoints",
         "Tokens on a logarithmic axis but for the start. Norm ratio: the largest over layers; value ratio: the "
         "smallest."),
    )  # fmt: skip
    for name, part, panels_of, title, words in drawings:
        if part and (panels := panels_of(part)):
            yield Picture(name, title, words, panels, across=1 if name in ("change", "perturbation") else 3)


def _curves(title: str, lines: Mapping[str, Line], xlabel: str, scale: Callable[[Axes, list[float]], None]) -> Panel:
    """A line a mode; `scale` sets the axes for the values in it."""

    def draw(axis: Axes) -> None:
        for mode, (at, values, errors) in lines.items():
            # Modes often fall on one another: with rotary positions, key 0 masked and no BOS are the same.
            style = {"linestyle": "--" if mode == "first_key_masked" else "-", "markevery": 1, "markersize": 3}
            line(axis, at, values, MODE_LABELS[mode], MODE_LOOKS[mode], **style)
            if errors:
                axis.errorbar(at, values, yerr=errors, fmt="none", ecolor=MODE_LOOKS[mode][0], capsize=2, linewidth=0.8)
        scale(axis, [value for _, values, _ in lines.values() for value in values])
        axis.set_xlabel(xlabel)
        axis.grid(axis="y")

    return Panel(title, draw)


def _drawn(measured: Measured, group: Group) -> list[tuple[str, Column]]:
    """What a group's panels are of: errors are drawn with what they are of."""
    return [(name, column) for name, column in columns_of(measured, group) if not column.title.startswith("±")]


def _by_depth(group: Group, measured: Measured) -> list[Panel]:
    """A panel for each column of a group; layer −1 is what the first block reads."""

    def of_mode(column: Column, result: Any) -> Line:
        points = [(layer - 1, value) for layer, value in enumerate(column.values(result)) if value is not None]
        errors = column.read(result, column.error) if column.error else ()
        return [at for at, _ in points], [value for _, value in points], [e for e in errors if e is not None]

    def scale(axis: Axes, values: list[float]) -> None:
        whole_ticks(axis.xaxis)
        if min(values) > 0 and max(values) / min(values) > 50:
            axis.set_yscale("log")

    return [
        _curves(column.title, {mode: of_mode(column, of) for mode, of in measured[name].items()}, "layer", scale)
        for name, column in _drawn(measured, group)
    ]


def _length(by_length: Measured) -> list[Panel]:
    first = next(iter(by_length.values()))
    lengths = [int(length) for length in by_length]

    def of_mode(name: str, column: Column, mode: str) -> Line:
        values = [last_layer(measured, name, column, mode) for measured in by_length.values()]
        return lengths, [math.nan if value is None else value for value in values], ()  # a probe that was interrupted

    def scale(axis: Axes, _: list[float]) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])

    modes = modes_of(first, "mixing")
    return [
        _curves(column.title, {mode: of_mode(name, column, mode) for mode in modes}, "tokens", scale)
        for name, column in _drawn(first, "mixing")
    ]


def _checkpoint(checkpoints: Measured) -> list[Panel]:
    points = checkpoints["points"]
    tokens = [point["tokens"] for point in points]
    lines = {
        title: {mode: (tokens, [read(p["modes"][mode], mode) for p in points], ()) for mode in points[0]["modes"]}
        for _, title, read in ALONG
    }
    return [
        _curves(title, of_modes, "tokens seen", lambda axis, _: token_axis(axis, tokens))
        for title, of_modes in lines.items()
    ]


def _key_0_seen(modes: Measured) -> Measured:
    """The modes in which key 0 can be seen, unless there are no others."""
    return {mode: part for mode, part in modes.items() if mode != "first_key_masked"} or modes


def _heads(modes: Measured, mass: str = "mass") -> list[Panel]:
    at_first = {mode: next(iter(keys.values())) for mode, keys in _key_0_seen(modes).items()}
    maps = {mode: result[mass] for mode, result in at_first.items() if result.get(mass)}
    if not maps:
        return []
    top = mass_scale(list(maps.values()))

    def draw(values: Any, axis: Axes) -> None:
        heat(axis, values, "sink mass" if mass == "mass" else "mass", top)
        whole_ticks(axis.xaxis, axis.yaxis)
        axis.set(xlabel="head", ylabel="layer")

    return mode_panels(maps, draw, height=max(2.2, 1 + 0.2 * len(next(iter(maps.values())))))


def _map(modes: Measured) -> list[Panel]:
    def draw(strongest: Measured, axis: Axes) -> None:
        heat(axis, strongest["attention"], "attention", 1, root=True, aspect="equal")
        labels = [_visible(text) for text in strongest["text"]]
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axis.set_yticks(range(len(labels)), labels, fontsize=6)
        axis.set(xlabel="key", ylabel="query")

    head = next(iter(modes.values()))
    title = f"{{}}: layer {head['layer']}, head {head['head']}"
    return mode_panels(_key_0_seen(modes), draw, title, height=5.6, width=6.4)


def _visible(text: str) -> str:
    """A token as a label: no control characters, no dollar that would begin a formula."""
    printable = "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in text)
    return drawable(printable.strip()[:14])[:18] or "␣"


def _norm(modes: Measured) -> list[Panel]:
    def draw(states: Measured, axis: Axes) -> None:
        depth = len(states["norm"]) - 1
        scale = matplotlib.cm.ScalarMappable(Normalize(-1, depth - 1), "viridis")
        for layer, values in enumerate(states["norm"]):
            axis.plot(values, color=scale.cmap(layer / max(1, depth)), linewidth=1)
        axis.set(yscale="log", xlabel="position in the row", ylabel="‖h‖")
        whole_ticks(axis.figure.colorbar(scale, ax=axis, label="layer").ax.yaxis)

    return mode_panels(modes, draw)


def _change(modes: Measured, labels: Sequence[str] = ()) -> list[Panel]:
    """How states change by layer and token; of one text, whose tokens are `labels`, or relative, over documents."""
    key, name = ("change", "change") if labels else ("relative", "relative change")
    maps = {mode: part[key] for mode, part in modes.items()}
    top = max(max(map(max, values)) for values in maps.values()) or 1.0
    rows, columns = np.shape(next(iter(maps.values())))

    def draw(values: Any, axis: Axes) -> None:
        extent = (-0.5, columns - 0.5, -1.5, rows - 1.5)
        heat(axis, values, name, top, root=True, cmap="magma", origin="lower", extent=extent)
        axis.set(ylabel="layer", xlabel="" if labels else "token of the text")
        whole_ticks(axis.yaxis)
        if labels:
            axis.set_xticks(range(len(labels)), [_visible(t) for t in labels], rotation=90, fontsize=6)

    height = max(1.7, 1.1 + 0.16 * rows) + 0.6 * bool(labels)
    return mode_panels(maps, draw, height=height, width=min(14, max(7, 0.14 * columns)))


def _position(positions: Measured) -> list[Panel]:
    spans = next(iter(positions.values()))

    def scale(axis: Axes, _: list[float]) -> None:
        axis.set_xticks(range(len(spans)), [f"{s['start']}–{s['end'] - 1}" for s in spans], rotation=30, ha="right")
        axis.set(yscale="log", ylabel="perplexity")

    lines = {mode: (range(len(of)), [span["perplexity"] for span in of], ()) for mode, of in positions.items()}
    return [_curves("Perplexity", lines, "position in the document, tokens", scale)]


def _streaming(streaming: Measured) -> list[Panel]:
    def draw(axis: Axes) -> None:
        for mode, lines in streaming.items():
            cached, (colour, marker) = [each for each in lines if each["cached"]], MODE_LOOKS[mode]
            at = [f"{each['kept']} + {each['window']}" for each in cached]
            line(axis, at, [s["loss"] for s in cached], MODE_LABELS[mode], (colour, marker), linestyle="")  # type: ignore[arg-type]
            axis.axhline(lines[0]["loss"], color=colour, linestyle="--", linewidth=1, gid=f"series:{MODE_LABELS[mode]}")
        axis.set(xlabel="keys kept at the start + last keys", ylabel="loss, nats per token")
        axis.grid(axis="y")

    return [Panel("Loss", draw)]
