"""Figures of what `sinkbed probe` measured, drawn once for a paper (PNG, SVG), the page and W&B."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sinkbed.train.measure.measures import Column, Group
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.figures import MODE_COLOURS, drawable, mass_scale
from sinkbed.train.report.model_tables import ALONG, Measured, columns_of, last_layer, modes_of, note_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Line = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Abscissas, values and their standard errors, where there are any."""


def figures(measured: Measured) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of everything that was measured."""
    change = measured.get("change", {})
    drawings: tuple[tuple[str, Any, Callable[[Any], Figure], str, str], ...] = (
        (
            "sink_heads", measured.get("sinks", {}).get("natural"), _heads_figure,
            "Where the sink sits",
            "Mean attention on the first key, layers down, heads across.",
        ),
        (
            "attention", measured.get("map"), _map_figure,
            "The strongest sink head",
            "Attention of the head with most mass on the first key in the first mode, and of the same head in the "
            "others; first document, queries down, keys across. Colours go by the square root.",
        ),
        (
            "norms", measured.get("states"), _norm_figure,
            "Norms of the hidden states",
            "‖h‖ by position in the row; a line a layer, dark to bright with depth (in: what the first block reads).",
        ),
        (
            "states", _by_depth(measured, "states"), _depth_figure,
            "The first token against the others",
            note_of(measured, "states"),
        ),
        (
            "change", change, lambda change: _change_figure(change["modes"], change["text"]),
            f"One word changed: {change.get('old')} → {change.get('new')}",
            "Norm of the change of the hidden states, layers up, tokens across, on one scale "
            "(after Figure 2 of arXiv 2504.02732).",
        ),
        (
            "perturbation", measured.get("perturbation"), _change_figure,
            "How far a changed token reaches",
            "Change of the hidden states over their mean norm after one token was replaced; mean over documents, "
            "layers up, text tokens across, on one scale; colours go by the square root.",
        ),
        (
            "mixing", _by_depth(measured, "mixing"), _depth_figure,
            "Mixing by depth",
            note_of(measured, "mixing"),
        ),
        (
            "by_length", measured.get("by_length"), _length_figure,
            "Mixing by context length",
            "The last layer's figures.",
        ),
        (
            "positions", measured.get("positions"), _position_figure,
            "Perplexity by position in the document",
            "Of the targets at these positions; perplexity on a logarithmic axis.",
        ),
        (
            "streaming", measured.get("streaming"), _streaming_figure,
            "With a cache of keys",
            "Loss when a query sees the first k keys and the last ones of a cache of constant size; dashed: the keys "
            "seen in training.",
        ),
        (
            "checkpoints", measured.get("checkpoints"), _checkpoint_figure,
            "Along the run's checkpoints",
            "Tokens on a logarithmic axis but for the start. Norm ratio: the largest over layers; value ratio: the "
            "smallest.",
        ),
    )  # fmt: skip
    for name, part, draw, title, caption in drawings:
        if part:
            yield name, title, caption, draw(part)


def _line(axis: Axes, at: Sequence[float], values: Sequence[float], mode: str) -> None:
    """Values of a mode, under its name."""
    # Where modes often fall on one another: with rotary positions, key 0 masked and no BOS are the same.
    style = "o--" if mode == "first_key_masked" else "o-"
    axis.plot(at, values, style, markersize=3, color=MODE_COLOURS[mode], linewidth=1.2, label=MODE_LABELS[mode])


def _panels(
    panels: Sequence[tuple[str, dict[str, Line]]],
    xlabel: str,
    scale: Callable[[Axes, list[float]], None],
    *,
    across: int = 4,
    height: float = 2.3,
) -> Figure:
    """A small plot under each title, a line a mode; `scale` sets the axes of one for the values in it."""
    import matplotlib.pyplot as plt

    across = min(across, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(3 * across, height * down + 0.5), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    labels: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes.flat, panels, strict=False):
        for mode, (at, values, errors) in lines.items():
            _line(axis, at, values, mode)
            if errors:
                axis.errorbar(at, values, yerr=errors, fmt="none", ecolor=MODE_COLOURS[mode], capsize=2, linewidth=0.8)
        axis.set_title(title)
        scale(axis, [value for _, values, _ in lines.values() for value in values])
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labels[label] = line
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    figure.legend(list(labels.values()), list(labels), loc="outside upper left", ncols=len(labels))
    return figure


def _drawn(measured: Measured, group: Group) -> list[tuple[str, Column]]:
    """What a group's panels are of: errors are drawn with what they are of."""
    return [(name, column) for name, column in columns_of(measured, group) if not column.title.startswith("±")]


def _by_depth(measured: Measured, group: Group) -> list[tuple[str, dict[str, Line]]]:
    """A panel for each column of a group; layer −1 is what the first block reads."""

    def line(column: Column, result: Any) -> Line:
        points = [(layer - 1, value) for layer, value in enumerate(column.values(result)) if value is not None]
        errors = column.read(result, column.error) if column.error else ()
        return [at for at, _ in points], [value for _, value in points], [e for e in errors if e is not None]

    return [
        (column.title, {mode: line(column, result) for mode, result in measured[name].items()})
        for name, column in _drawn(measured, group)
    ]


def _depth_figure(panels: Sequence[tuple[str, dict[str, Line]]]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    def scale(axis: Axes, values: list[float]) -> None:
        _whole_ticks(axis.xaxis)
        if min(values) > 0 and max(values) / min(values) > 50:
            axis.set_yscale("log")
        else:
            axis.yaxis.set_major_locator(MaxNLocator(4))

    return _panels(panels, "layer", scale)


def _length_figure(by_length: Measured) -> Figure:
    measured = next(iter(by_length.values()))
    lengths = [int(length) for length in by_length]

    def line(name: str, column: Column, mode: str) -> Line:
        values = [last_layer(of_length, name, column, mode) for of_length in by_length.values()]
        return lengths, [math.nan if value is None else value for value in values], ()  # a probe that was interrupted

    def scale(axis: Axes, _: list[float]) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])

    panels = [
        (column.title, {mode: line(name, column, mode) for mode in modes_of(measured, "mixing")})
        for name, column in _drawn(measured, "mixing")
    ]
    return _panels(panels, "tokens", scale)


def _checkpoint_figure(checkpoints: Measured) -> Figure:
    points = checkpoints["points"]
    tokens = [point["tokens"] for point in points]
    first = min(filter(None, tokens), default=1)
    panels: list[tuple[str, dict[str, Line]]] = [
        (title, {mode: (tokens, [read(p["modes"][mode], mode) for p in points], ()) for mode in points[0]["modes"]})
        for _, title, read in ALONG
    ]
    return _panels(
        panels, "tokens seen", lambda axis, _: axis.set_xscale("symlog", linthresh=first), across=5, height=2.5
    )


def _visible_modes(modes: Measured) -> Measured:
    """Those in which there is something on key 0 to be seen, unless there are no others."""
    return {mode: part for mode, part in modes.items() if mode != "first_key_masked"} or modes


def _heads_figure(modes: Measured) -> Figure:
    import matplotlib.pyplot as plt

    maps = {mode: next(iter(keys.values()))["mass"] for mode, keys in _visible_modes(modes).items()}
    layers, heads = len(first := next(iter(maps.values()))), len(first[0])
    figure, axes = plt.subplots(
        1, len(maps), figsize=(min(14, 1 + len(maps) * max(2.6, 0.28 * heads)), max(2.0, 1 + 0.22 * layers)),
        squeeze=False,
    )  # fmt: skip
    scale = mass_scale(list(maps.values()))
    image: Any = None
    for axis, (mode, mass) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(mass, vmin=0, vmax=scale, cmap="inferno", aspect="auto")
        axis.set_title(MODE_LABELS[mode])
        _whole_ticks(axis.xaxis, axis.yaxis)
        axis.set_xlabel("head")
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="sink mass")
    return figure


def _whole_ticks(*axes: Axis) -> None:
    """Ticks at whole numbers; −1 is what the first block reads."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.set_major_formatter(FuncFormatter(lambda at, _: "in" if at == -1 else f"{at:g}"))


def _map_figure(modes: Measured) -> Figure:
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    modes = _visible_modes(modes)
    figure, axes = plt.subplots(1, len(modes), figsize=(5.4 * len(modes), 5.2), squeeze=False)
    image: Any = None
    for axis, (mode, strongest) in zip(axes[0], modes.items(), strict=True):
        image = axis.imshow(strongest["attention"], norm=PowerNorm(0.5, 0, 1), cmap="inferno")
        axis.set_title(f"{MODE_LABELS[mode]}: layer {strongest['layer']}, head {strongest['head']}")
        labels = [_visible(text) for text in strongest["text"]]
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axis.set_yticks(range(len(labels)), labels, fontsize=6)
    figure.colorbar(image, ax=axes, shrink=0.7, label="attention")
    return figure


def _visible(text: str) -> str:
    """A token as a label: no control characters, no dollar that would begin a formula."""
    printable = "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in text)
    return drawable(printable.strip()[:14])[:18].replace("$", r"\$") or "␣"


def _norm_figure(modes: Measured) -> Figure:
    import matplotlib.cm
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize

    figure, axes = plt.subplots(1, len(modes), figsize=(3.6 * len(modes) + 0.6, 3.2), sharey=True, squeeze=False)
    depth = len(next(iter(modes.values()))["norm"]) - 1
    scale = matplotlib.cm.ScalarMappable(Normalize(-1, depth - 1), "viridis")
    for axis, (mode, measured) in zip(axes[0], modes.items(), strict=True):
        for layer, norms in enumerate(measured["norm"]):
            axis.plot(norms, color=scale.cmap(layer / max(1, depth)), linewidth=1)
        axis.set_yscale("log")
        axis.set_title(MODE_LABELS[mode])
        axis.set_xlabel("position in the row")
    axes[0][0].set_ylabel("‖h‖")
    bar = figure.colorbar(scale, ax=axes, label="layer")
    _whole_ticks(bar.ax.yaxis)
    return figure


def _change_figure(modes: Measured, labels: Sequence[str] | None = None) -> Figure:
    """How states change by layer and token; of one text, whose tokens are `labels`, or relative, over documents."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    key, what = ("relative", "relative change") if labels is None else ("change", "change")
    first = next(iter(modes.values()))[key]
    width = min(14, max(7, 0.2 * len(first[0])))
    height = max(1.6, 0.9 + 0.16 * len(first))
    figure, axes = plt.subplots(len(modes), 1, figsize=(width, height * len(modes) + 0.6), squeeze=False, sharex=True)
    top = max(max(map(max, measured[key])) for measured in modes.values()) or 1.0
    image: Any = None
    for axis, (mode, measured) in zip(axes[:, 0], modes.items(), strict=True):
        extent = (-0.5, len(first[0]) - 0.5, -1.5, len(first) - 1.5)
        image = axis.imshow(
            measured[key], origin="lower", norm=PowerNorm(0.5, 0, top), cmap="magma", aspect="auto", extent=extent
        )
        axis.set_title(MODE_LABELS[mode], loc="left")
        axis.set_ylabel("layer")
        _whole_ticks(axis.yaxis)
    if labels is not None:
        axes[-1, 0].set_xticks(range(len(labels)), [_visible(t) for t in labels], rotation=90, fontsize=7)
    else:
        axes[-1, 0].set_xlabel("token of the text")
    figure.colorbar(image, ax=axes, label=what, shrink=0.8)
    return figure


def _position_figure(positions: Measured) -> Figure:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for mode, spans in positions.items():
        _line(axis, range(len(spans)), [span["perplexity"] for span in spans], mode)
    spans = next(iter(positions.values()))
    axis.set_xticks(range(len(spans)), [f"{s['start']}–{s['end'] - 1}" for s in spans])
    axis.set_yscale("log")
    axis.set_xlabel("position in the document, tokens")
    axis.set_ylabel("perplexity")
    axis.legend()
    return figure


def _streaming_figure(streaming: Measured) -> Figure:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    modes = list(streaming)
    for index, (mode, lines) in enumerate(streaming.items()):
        cached = [line for line in lines if line["cached"]]
        at = [i + (index - (len(modes) - 1) / 2) * 0.8 / len(modes) for i in range(len(cached))]
        axis.bar(at, [s["loss"] for s in cached], 0.76 / len(modes), color=MODE_COLOURS[mode], label=MODE_LABELS[mode])
        axis.axhline(lines[0]["loss"], color=MODE_COLOURS[mode], linestyle="--", linewidth=1)
        axis.set_xticks(range(len(cached)), [f"{s['kept']} + {s['window']}" for s in cached])
    losses = [s["loss"] for lines in streaming.values() for s in lines]
    axis.set_ylim(0.9 * min(losses), max(losses) * 1.03)
    axis.set_xlabel("keys kept at the start + last keys")
    axis.set_ylabel("nats per token (axis does not start at 0)")
    figure.legend(loc="outside upper left", ncols=len(modes))
    return figure
