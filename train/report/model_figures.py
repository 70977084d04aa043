"""Figures of what `sinkbed probe` measured, drawn once for a paper (PNG, SVG), the page and W&B."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sinkbed.train.measure.measures import Column, Group, Layers
from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.figures import MODE_COLOURS, drawable, mass_scale
from sinkbed.train.report.model_tables import Measured, columns_of, last_layer, modes_of, note_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def figures(measured: Measured) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of everything that was measured."""
    if "sinks" in measured and "natural" in measured["sinks"]:
        yield (
            "sink_heads",
            "Where the sink sits",
            "Mean attention on the first key, layers down, heads across.",
            _heads_figure(measured["sinks"]["natural"]),
        )
    if "map" in measured:
        yield (
            "attention",
            "The strongest sink head",
            "Attention of the head with most mass on the first key in the first mode, and of the same head in the "
            "others; first document, queries down, keys across. Colours go by the square root.",
            _map_figure(measured["map"]),
        )
    if "states" in measured:
        yield (
            "norms",
            "Norms of the hidden states",
            "‖h‖ by position in the row; a line a layer, dark to bright with depth (in: what the first block reads).",
            _norm_figure(measured["states"]),
        )
    if columns_of(measured, "states"):
        yield ("states", "The first token against the others", note_of(measured, "states"), _panels(measured, "states"))
    if "change" in measured:
        change = measured["change"]
        yield (
            "change",
            f"One word changed: {change['old']} → {change['new']}",
            "Norm of the change of the hidden states, layers up, tokens across, on one scale "
            "(after Figure 2 of arXiv 2504.02732).",
            _change_figure(change["modes"], change["text"]),
        )
    if "perturbation" in measured:
        yield (
            "perturbation",
            "How far a changed token reaches",
            "Change of the hidden states over their mean norm after one token was replaced; mean over documents, "
            "layers up, text tokens across, on one scale; colours go by the square root.",
            _change_figure(measured["perturbation"], None, "relative"),
        )
    if columns_of(measured, "mixing"):
        yield ("mixing", "Mixing by depth", note_of(measured, "mixing"), _panels(measured, "mixing"))
    if "by_length" in measured:
        yield (
            "by_length",
            "Mixing by context length",
            "The last layer's figures.",
            _length_figure(measured["by_length"]),
        )
    if "positions" in measured:
        yield (
            "positions",
            "Perplexity by position in the document",
            "Of the targets at these positions; perplexity on a logarithmic axis.",
            _position_figure(measured["positions"]),
        )
    if "streaming" in measured:
        yield (
            "streaming",
            "With a cache of keys",
            "Loss when a query sees the first k keys and the last ones of a cache of constant size; dashed: the keys "
            "seen in training.",
            _streaming_figure(measured["streaming"]),
        )
    if "checkpoints" in measured:
        yield (
            "checkpoints",
            "Along the run's checkpoints",
            "Tokens on a logarithmic axis but for the start. Norm ratio: the largest over layers; value ratio: the "
            "smallest.",
            _checkpoint_figure(measured["checkpoints"]),
        )


# Where modes often fall on one another: with rotary positions, key 0 masked and no BOS are the same.
_DASHED = ("first_key_masked",)


def _line(axis: Axes, at: Sequence[float], values: Sequence[float], mode: str) -> None:
    """Values of a mode, under its name."""
    style = "o--" if mode in _DASHED else "o-"
    axis.plot(at, values, style, markersize=3, color=MODE_COLOURS[mode], linewidth=1.2, label=MODE_LABELS[mode])


def _heads_figure(modes: Measured) -> Figure:
    import matplotlib.pyplot as plt

    visible = [m for m in modes if m != "first_key_masked"] or list(modes)
    maps = {m: next(iter(modes[m].values()))["mass"] for m in visible}
    layers, heads = len(maps[visible[0]]), len(maps[visible[0]][0])
    figure, axes = plt.subplots(
        1, len(visible), figsize=(min(14, 1 + len(visible) * max(2.6, 0.28 * heads)), max(2.0, 1 + 0.22 * layers)),
        squeeze=False,
    )  # fmt: skip
    scale = mass_scale(list(maps.values()))
    image: Any = None
    for axis, mode in zip(axes[0], visible, strict=True):
        image = axis.imshow(maps[mode], vmin=0, vmax=scale, cmap="inferno", aspect="auto")
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

    visible = [m for m in modes if m != "first_key_masked"] or list(modes)
    figure, axes = plt.subplots(1, len(visible), figsize=(5.4 * len(visible), 5.2), squeeze=False)
    image: Any = None
    for axis, mode in zip(axes[0], visible, strict=True):
        strongest = modes[mode]
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
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(modes), figsize=(3.6 * len(modes) + 0.6, 3.2), sharey=True, squeeze=False)
    for axis, (mode, measured) in zip(axes[0], modes.items(), strict=True):
        layers = measured["norm"]
        colours = plt.get_cmap("viridis")
        for layer, norms in enumerate(layers):
            axis.plot(norms, color=colours(layer / max(1, len(layers) - 1)), linewidth=1)
        axis.set_yscale("log")
        axis.set_title(MODE_LABELS[mode])
        axis.set_xlabel("position in the row")
    axes[0][0].set_ylabel("‖h‖")
    import matplotlib.cm
    from matplotlib.colors import Normalize

    depth = len(next(iter(modes.values()))["norm"]) - 1
    scale = matplotlib.cm.ScalarMappable(Normalize(-1, depth - 1), "viridis")
    bar = figure.colorbar(scale, ax=axes, label="layer")
    _whole_ticks(bar.ax.yaxis)
    return figure


def _grid(count: int) -> tuple[Figure, Any]:
    """A figure of so many small plots, four a row, and its axes [rows, 4 or fewer]; those left over are hidden."""
    import matplotlib.pyplot as plt

    across = min(4, count)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(3 * across, 2.3 * down + 0.5), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def _panels(measured: Measured, group: Group) -> Figure:
    """A small plot against depth for each column, a line a mode."""
    from matplotlib.ticker import MaxNLocator

    columns = _drawn(measured, group)
    figure, axes = _grid(len(columns))
    for axis, (name, column) in zip(axes.flat, columns, strict=False):
        drawn: list[float] = []
        for mode, result in measured[name].items():
            at, values = _points(column.values(result))
            _line(axis, at, values, mode)
            if column.error:
                _, errors = _points(column.read(result, column.error))
                axis.errorbar(at, values, yerr=errors, fmt="none", ecolor=MODE_COLOURS[mode], capsize=2, linewidth=0.8)
            drawn += values
        axis.set_title(column.title)
        _whole_ticks(axis.xaxis)
        if min(drawn) > 0 and max(drawn) / min(drawn) > 50:
            axis.set_yscale("log")
        else:
            axis.yaxis.set_major_locator(MaxNLocator(4))
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    _mode_legend(figure)
    return figure


def _drawn(measured: Measured, group: Group) -> list[tuple[str, Column]]:
    """What a group's panels are of: errors are drawn with what they are of."""
    return [(name, column) for name, column in columns_of(measured, group) if not column.title.startswith("±")]


def _points(values: Layers) -> tuple[list[int], list[float]]:
    """Layers, −1 for what the first block reads, and their values."""
    points = [(layer - 1, value) for layer, value in enumerate(values) if value is not None]
    return [layer for layer, _ in points], [value for _, value in points]


def _mode_legend(figure: Figure) -> None:
    """A line a mode, whatever the number of plots that it is in."""
    lines = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(lines.values()), list(lines), loc="outside upper left", ncols=len(lines))


def _change_figure(modes: Measured, labels: Sequence[str] | None, key: str = "change") -> Figure:
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

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
    figure.colorbar(image, ax=axes, label="change" if key == "change" else "relative change", shrink=0.8)
    return figure


def _length_figure(by_length: Measured) -> Figure:
    measured = next(iter(by_length.values()))
    columns, modes = _drawn(measured, "mixing"), modes_of(measured, "mixing")
    figure, axes = _grid(len(columns))
    lengths = [int(length) for length in by_length]
    for axis, (name, column) in zip(axes.flat, columns, strict=False):
        for mode in modes:
            values = [last_layer(of_length, name, column, mode) for of_length in by_length.values()]
            points = [math.nan if value is None else value for value in values]  # of a probe that was interrupted
            _line(axis, lengths, points, mode)
        axis.set_title(column.title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    _mode_legend(figure)
    return figure


def _position_figure(positions: Measured) -> Figure:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for mode, spans in positions.items():
        values = [s["perplexity"] for s in spans]
        _line(axis, range(len(spans)), values, mode)
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


def _checkpoint_figure(checkpoints: Measured) -> Figure:
    import matplotlib.pyplot as plt

    points = checkpoints["points"]
    modes = list(points[0]["modes"])
    panels: tuple[tuple[str, Callable[[Measured, str], float]], ...] = (
        ("sink rate, % (eps 0.3)", lambda v, m: v[f"sink/rate_eps0.3/{m}"]),
        ("sink mass", lambda v, m: v[f"sink/mass/{m}"]),
        ("loss, nats per token", lambda v, m: v[f"val/loss/{m}"]),
        ("largest ‖h₀‖ / ‖hₜ‖", lambda v, m: max(x for k, x in v.items() if k.startswith("state/first_token_norm"))),
        ("smallest ‖v₀‖ / ‖vₜ‖", lambda v, m: min(x for k, x in v.items() if k.startswith("state/value_norm"))),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3))
    least = min((p["tokens"] for p in points if p["tokens"]), default=1)
    for axis, (title, read) in zip(axes, panels, strict=True):
        for mode in modes:
            values = [read(p["modes"][mode], mode) for p in points]
            _line(axis, [p["tokens"] for p in points], values, mode)
        axis.set_xscale("symlog", linthresh=least)
        axis.set_title(title)
        axis.set_xlabel("tokens seen")
    _mode_legend(figure)
    return figure
