"""What `sinkbed probe` found: tables, CSV, figures for a paper (PNG and SVG), and one HTML page that holds them all."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from train import rundir
from train.figures import COLOURS, STYLE, mass_scale
from train.page import document, table
from train.report import MODE_LABELS, fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Found = dict[str, Any]
_LINES = ("-", "--", ":", "-.", (0, (1, 3)))


@dataclass(frozen=True)
class Table:
    """A table of the terminal, the page and a CSV file."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str | float | int | None, ...]]
    note: str = ""

    def cells(self) -> list[tuple[str, ...]]:
        """Rows as text: four significant digits."""
        return [tuple(_cell(value) for value in row) for row in self.rows]


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size and (size >= 1e5 or size < 1e-3):
        return f"{value:.2e}"
    return fixed(value, 3 if size < 10 else 2 if size < 100 else 1)


# One column a layer's figure: (measure, header, how to read it out of the measure's result at layer l of 0 … L).
# Attention of layer l feeds the hidden states of layer l; layer 0 is what the first block reads and has none.
_Column = tuple[str, str, Callable[[Any, int], float | None]]


def _hidden(name: str) -> Callable[[Any, int], float | None]:
    return lambda found, layer: found[name][layer]


def _heads(name: str) -> Callable[[Any, int], float | None]:
    return lambda found, layer: fmean(found[name][layer - 1]) if layer else None


def _of_layer(name: str) -> Callable[[Any, int], float | None]:
    return lambda found, layer: found[name][layer - 1] if layer else None


def _rank(name: str) -> Callable[[Any, int], float | None]:
    return lambda found, layer: found["rest"][name][layer]


def _jacobian(name: str) -> Callable[[Any, int], float | None]:
    return lambda found, layer: found[name][found["layers"].index(layer)] if layer in found["layers"] else None


_STATES: tuple[_Column, ...] = (
    ("states", "‖h₀‖ / ‖hₜ‖", _hidden("norm_ratio")),
    ("states", "max |h|", _hidden("max_activation")),
    ("states", "max / median", _hidden("max_over_median")),
    ("states", "kurtosis h₀", _hidden("kurtosis_first")),
    ("states", "kurtosis hₜ", _hidden("kurtosis")),
    ("states", "|cos(hₜ, h₀)| > 0.9", _hidden("secondary_share")),
    ("states", "‖k₀‖ / ‖kₜ‖", _heads("key_norm_ratio")),
    ("states", "‖v₀‖ / ‖vₜ‖", _heads("value_norm_ratio")),
    ("states", "cos(qₜ, k₀)", _heads("cosine_first")),
    ("states", "cos(qₜ, kₛ)", _heads("cosine_others")),
    ("states", "entropy", _heads("entropy")),
    ("gradients", "‖∂h₀‖ / ‖∂hₜ‖", _hidden("ratio")),
)
_MIXING: tuple[_Column, ...] = (
    ("perturbation", "perturbation spread", _hidden("spread")),
    ("rank", "rank distance", _rank("relative_distance")),
    ("rank", "effective rank", _rank("effective_rank")),
    ("rank", "matrix entropy", _rank("matrix_entropy")),
    ("rank", "last distance", _rank("relative_last_distance")),
    ("paths", "paths from key 0", _of_layer("first")),
    ("paths", "path sources", _of_layer("sources")),
    ("jacobian", "‖∂v_last/∂vᵢ‖", _jacobian("others")),
    ("jacobian", "± directions", _jacobian("others_error")),
    ("jacobian", "± documents", _jacobian("across")),
)
_STATES_NOTE = (
    "Layer 0 is what the first block reads; a row of layer l has the hidden states that block l writes and the attention "
    "inside it. Subscript 0: the first token of the row; t: mean over the others. Entropy in nats. ∂: gradient of the loss."
)
_MIXING_NOTE = (
    "Perturbation spread: one token replaced, mean change of the hidden states after it over their norm. Rank distance: "
    "‖V − mean‖/‖V‖, last distance: ‖vₙ − vₙ₋₁‖ over their norm, both without the first token; 0 is collapse. Paths: share of "
    "Theorem 3.2's bound (arXiv 2504.02732) into the last token that starts at key 0, and the effective number of sources. "
    "‖∂v_last/∂vᵢ‖: Frobenius norm, mean over the text tokens i before the last; ± standard errors."
)


def tables(found: Found) -> list[Table]:
    """Everything that has the form of a table."""
    out = []
    if "sinks" in found:
        out.append(_sink_table(found["sinks"]))
    for mode in _modes(found):
        for name, columns, note in (("states", _STATES, _STATES_NOTE), ("mixing", _MIXING, _MIXING_NOTE)):
            layers = _layer_table(found, mode, columns)
            if layers is not None:
                header, rows = layers
                title = f"{name.capitalize()} by layer: {MODE_LABELS[mode]}"
                out.append(Table(f"{name}-{mode}", title, header, rows, note))
    for mode, measured in found.get("states", {}).items():
        out.append(_received_table(mode, measured))
    if "by_length" in found:
        out.append(_length_table(found))
    if "positions" in found:
        out.append(_position_table(found["positions"]))
    if "streaming" in found:
        out.append(_streaming_table(found["streaming"]))
    if "checkpoints" in found:
        out.append(_checkpoint_table(found["checkpoints"]))
    return out


def _modes(found: Found) -> list[str]:
    names = ("states", "gradients", "perturbation", "rank", "paths", "jacobian")
    return list(dict.fromkeys(mode for name in names for mode in found.get(name, {})))


def _sink_table(sinks: Found) -> Table:
    rows = []
    for kind, modes in sinks.items():
        for mode, keys in modes.items():
            for key, r in keys.items():
                rate, mass = (r["rate"], r["mass"]) if key == "0" else (r["rate_placed"], r["mass_placed"])
                rates = [_all(rate[eps]) for eps in rate]
                rows.append((kind, MODE_LABELS[mode], int(key), *rates, _all(mass), r["loss"], r["bits_per_byte"]))
    header = ("input read", "mode", "key", *(f"sink rate %, eps {eps}" for eps in ("0.2", "0.3", "0.5", "0.8")))
    return Table("sinks", "Sinks", (*header, "sink mass", "loss", "bits per byte"), rows)


def _all(rows: Sequence[Sequence[float]]) -> float:
    return fmean(x for row in rows for x in row)


def _layer_table(
    found: Found, mode: str, columns: Sequence[_Column]
) -> tuple[tuple[str, ...], list[tuple[float | int | None, ...]]] | None:
    present = [c for c in columns if mode in found.get(c[0], {})]
    if not present:
        return None
    depth = _depth(found, mode)
    rows = [(layer, *(read(found[name][mode], layer) for name, _, read in present)) for layer in range(depth + 1)]
    return ("layer", *(header for _, header, _ in present)), rows


def _depth(found: Found, mode: str) -> int:
    """L."""
    for name, key in (("states", "norm_ratio"), ("gradients", "ratio"), ("perturbation", "spread")):
        if mode in found.get(name, {}):
            return len(found[name][mode][key]) - 1
    if mode in found.get("rank", {}):
        return len(found["rank"][mode]["rest"]["distance"]) - 1
    if mode in found.get("paths", {}):
        return len(found["paths"][mode]["first"])
    return int(found["jacobian"][mode]["layers"][-1])


def _received_table(mode: str, measured: Found) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    pairs = list(measured["strongest_position"])
    for index, by_token in enumerate(measured["strongest_token"]):
        position = pairs[index] if index < len(pairs) else None
        rows.append((
            *((position["position"], 100 * position["share"]) if position else (None, None)),
            repr(by_token.get("text", by_token["token"])) + (" at the start" if by_token["first"] else ""),
            100 * by_token["share"],
        ))  # fmt: skip
    return Table(
        f"received-{mode}",
        f"Where most attention goes: {MODE_LABELS[mode]}",
        ("position", "% of heads", "token", "% of heads"),
        rows,
        "The key that receives most in a (document, layer, head), by its position and by its token.",
    )


def _length_table(found: Found) -> Table:
    rows = []
    for length, measures in found["by_length"].items():
        for mode in dict.fromkeys(mode for of in measures.values() for mode in of):
            values = []
            for name, _, read in _MIXING:
                of = measures.get(name, {}).get(mode)
                values.append(None if of is None else read(of, _depth(measures, mode)))
            rows.append((int(length), MODE_LABELS[mode], *values))
    header = ("tokens", "mode", *(title for _, title, _ in _MIXING))
    keep = [i for i in range(len(header)) if any(row[i] is not None for row in rows)]
    rows = [tuple(row[i] for i in keep) for row in rows]
    return Table("by_length", "Mixing in the last layer by context length", tuple(header[i] for i in keep), rows)


def _position_table(positions: Found) -> Table:
    modes = list(positions)
    rows: list[tuple[str | float | int | None, ...]] = [
        (f"{span['start']} to {span['end'] - 1}", span["tokens"], *(positions[m][i]["perplexity"] for m in modes))
        for i, span in enumerate(positions[modes[0]])
    ]
    header = ("position in the document", "targets", *(MODE_LABELS[mode] for mode in modes))
    return Table("positions", "Perplexity by position in the document", header, rows)


def _streaming_table(streaming: Found) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for mode, lines in streaming.items():
        for line in lines:
            full = line is lines[0]
            keys = "all" if full else f"{line['kept']} + {line['window']}"
            rows.append((MODE_LABELS[mode], keys, line["tokens"], line["loss"], line["perplexity"]))
    note = (
        "The keys that a query sees: first ones kept + last ones, its own among them (arXiv 2309.17453). The targets are "
        "those past what the cache holds, the same in every line of a mode; positions are those of the text."
    )
    return Table("streaming", "With a cache of keys", ("mode", "keys", "targets", "loss", "perplexity"), rows, note)


def _checkpoint_table(checkpoints: Found) -> Table:
    rows = []
    for point in checkpoints["points"]:
        for mode, values in point["modes"].items():
            last = max(int(k.split("/")[2]) for k in values if k.startswith("state/first_token_norm_ratio/"))
            rows.append((
                point["step"], point["tokens"], MODE_LABELS[mode], values[f"sink/rate/0.3/{mode}"],
                values[f"sink/mass/{mode}"], values[f"val/loss/{mode}"],
                max(values[f"state/first_token_norm_ratio/{layer}/{mode}"] for layer in range(last + 1)),
                min(values[f"state/value_norm_ratio/{layer}/{mode}"] for layer in range(last + 1)),
            ))  # fmt: skip
    header = ("step", "tokens", "mode", "sink rate %", "sink mass", "loss", "largest ‖h₀‖/‖hₜ‖", "smallest ‖v₀‖/‖vₜ‖")
    rate, mode = checkpoints["onset_rate"], MODE_LABELS[checkpoints["onset_mode"]]
    onset = checkpoints["onset_tokens"]
    reached = f"first reached at {onset:,} tokens" if onset is not None else "not reached"
    return Table(
        "checkpoints",
        "Along the run's checkpoints",
        header,
        rows,
        f"Onset: a sink rate of {rate:g} % ({mode}) {reached}.",
    )


def print_tables(found: Found) -> None:
    """The tables but that of the sinks, which was printed line by line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console()
    console = console if console.is_terminal else Console(width=180)
    notes = set()
    for t in tables(found):
        if t.name == "sinks":
            continue
        drawn = Drawn(title=t.title, title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
        if t.note not in notes:
            drawn.caption = t.note
            notes.add(t.note)
        for name in t.header:
            drawn.add_column(name, justify="left" if name in ("mode", "token", "keys") else "right")
        for row in t.cells():
            drawn.add_row(*row)
        console.print(drawn)


def write(found: Found, folder: Path) -> Path:
    """Write probe.json, a CSV a table, the figures as PNG and SVG, and index.html; returns the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_json(folder / "probe.json", found)
    for t in tables(found):
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(t.header)
        writer.writerows(["" if value is None else value for value in row] for row in t.rows)
        rundir.write_atomic(folder / f"{t.name}.csv", buffer.getvalue())
    parts = []
    with plt.rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": "sinkbed"}):
        for name, title, words, figure in figures(found):
            vector = io.BytesIO()
            figure.savefig(vector, format="svg", metadata={"Date": None})
            raster = io.BytesIO()
            figure.savefig(raster, format="png", dpi=140)
            plt.close(figure)
            rundir.write_atomic(folder / f"{name}.svg", vector.getvalue())
            rundir.write_atomic(folder / f"{name}.png", raster.getvalue())
            parts.append(_section(title, words, vector.getvalue().decode()))
    rundir.write_atomic(folder / "index.html", _page(found, parts))
    return folder / "index.html"


def _section(title: str, words: str, svg: str) -> str:
    drawing = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    return (
        f"<h2>{html.escape(title)}</h2><figure><div class='drawing'>{drawing}</div>"
        f"<figcaption>{html.escape(words)}</figcaption></figure>"
    )


def _page(found: Found, figures: Sequence[str]) -> str:
    settings = found["settings"]
    intro = (
        f"{found['documents']} held-out documents; T = {settings['sink_tokens']}; states and mixing on the first "
        f"{settings['mixing_documents']} documents. One measurement of one model: no interval over seeds."
    )
    body = [f'<p class="note">{html.escape(intro)}</p>', *figures]
    for t in tables(found):
        body.append(f"<h2>{html.escape(t.title)}</h2>")
        body.append(table(t.header, t.cells()))
        if t.note:
            body.append(f'<p class="note">{html.escape(t.note)}</p>')
    return document(f"Probe of {found['model']}", body)


def figures(found: Found) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of everything that was measured."""
    if "sinks" in found and "natural" in found["sinks"]:
        yield (
            "sink_heads",
            "Where the sink sits",
            "Mean attention on the first key, layers down, heads across.",
            _heads_figure(found["sinks"]["natural"]),
        )
    if "map" in found:
        yield (
            "attention",
            "The strongest sink head",
            "Attention of the head with most mass on the first key; first document, queries down, keys across. Colours go "
            "by the square root.",
            _map_figure(found["map"]),
        )
    if "states" in found:
        yield (
            "norms",
            "Norms of the hidden states",
            "‖h‖ by position in the row; a line a layer, dark to bright with depth (0: what the first block reads).",
            _norm_figure(found["states"]),
        )
        yield ("states", "The first token against the others", _STATES_NOTE, _panels(found, _STATES))
    if "change" in found:
        change = found["change"]
        yield (
            "change",
            f"One word changed: {change['old']} → {change['new']}",
            "Norm of the change of the hidden states, layers up, tokens across, on one scale "
            "(after Figure 2 of arXiv 2504.02732).",
            _change_figure(change["modes"], change["text"]),
        )
    if "perturbation" in found:
        yield (
            "perturbation",
            "How far a changed token reaches",
            "Change of the hidden states over their mean norm after one token was replaced; mean over documents, layers "
            "up, text tokens across, on one scale; colours go by the square root.",
            _change_figure(found["perturbation"], None, "relative"),
        )
    if _modes(found) and {"perturbation", "rank", "paths", "jacobian"} & set(found):
        yield ("mixing", "Mixing by depth", _MIXING_NOTE, _panels(found, _MIXING))
    if "by_length" in found:
        yield ("by_length", "Mixing by context length", "The last layer's figures.", _length_figure(found))
    if "positions" in found:
        yield (
            "positions",
            "Perplexity by position in the document",
            "Spans that double; both axes logarithmic.",
            _position_figure(found["positions"]),
        )
    if "streaming" in found:
        yield (
            "streaming",
            "With a cache of keys",
            "Loss when a query sees the first k keys and the last ones of a cache of constant size; lines: all keys.",
            _streaming_figure(found["streaming"]),
        )
    if "checkpoints" in found:
        yield (
            "checkpoints",
            "Along the run's checkpoints",
            "Tokens on a logarithmic axis but for the start. Norm ratio: the largest over layers; value ratio: the "
            "smallest.",
            _checkpoint_figure(found["checkpoints"]),
        )


def _colour(mode: str) -> str:
    return COLOURS[{"bos": 0, "text": 2, "first_key_masked": 6, "random_first": 3, "as_trained": 5}[mode]]


def _heads_figure(modes: Found) -> Figure:
    import matplotlib.pyplot as plt

    shown = [m for m in modes if m != "first_key_masked"] or list(modes)
    maps = {m: next(iter(modes[m].values()))["mass"] for m in shown}
    layers, heads = len(maps[shown[0]]), len(maps[shown[0]][0])
    figure, axes = plt.subplots(
        1, len(shown), figsize=(min(14, 1 + len(shown) * max(2.6, 0.28 * heads)), max(2.0, 1 + 0.22 * layers)),
        squeeze=False,
    )  # fmt: skip
    scale = mass_scale(list(maps.values()))
    image = None
    for axis, mode in zip(axes[0], shown, strict=True):
        image = axis.imshow(maps[mode], vmin=0, vmax=scale, cmap="inferno", aspect="auto")
        axis.set_title(MODE_LABELS[mode])
        _whole(axis)
        axis.set_xlabel("head")
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="sink mass")
    return figure


def _whole(axis: Axes) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _map_figure(modes: Found) -> Figure:
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    shown = [m for m in modes if m != "first_key_masked"] or list(modes)
    figure, axes = plt.subplots(1, len(shown), figsize=(5.4 * len(shown), 5.2), squeeze=False)
    image = None
    for axis, mode in zip(axes[0], shown, strict=True):
        found = modes[mode]
        image = axis.imshow(found["attention"], norm=PowerNorm(0.5, 0, 1), cmap="inferno")
        axis.set_title(f"{MODE_LABELS[mode]}: layer {found['layer']}, head {found['head']}")
        labels = [_visible(text) for text in found["text"]]
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axis.set_yticks(range(len(labels)), labels, fontsize=6)
    figure.colorbar(image, ax=axes, shrink=0.7, label="attention")
    return figure


def _visible(text: str) -> str:
    """A token as a label: no control characters, no dollar that would begin a formula."""
    shown = "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in text)
    return shown.strip().replace("$", r"\$")[:14] or "␣"


def _norm_figure(modes: Found) -> Figure:
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
    scale = matplotlib.cm.ScalarMappable(Normalize(0, depth), "viridis")
    figure.colorbar(scale, ax=axes, label="layer")
    return figure


def _panels(found: Found, columns: Sequence[_Column]) -> Figure:
    """A small plot against depth for each column, a line a mode."""
    import matplotlib.pyplot as plt

    shown = [c for c in columns if c[0] in found and not c[1].startswith("±")]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(down, across, figsize=(3 * across, 2.3 * down + 0.5), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (name, title, read) in zip(axes.flat, shown, strict=False):
        for mode, measured in found[name].items():
            layers = [x for x in range(_depth(found, mode) + 1) if read(measured, x) is not None]
            values = [read(measured, x) for x in layers]
            axis.plot(layers, values, "o-", markersize=3, color=_colour(mode), linewidth=1.2)
            if name == "jacobian":
                errors = [measured["across"][measured["layers"].index(x)] for x in layers]
                axis.errorbar(layers, values, yerr=errors, fmt="none", ecolor=_colour(mode), capsize=2, linewidth=0.8)
        axis.set_title(title)
        _whole(axis)
        from matplotlib.ticker import MaxNLocator

        axis.yaxis.set_major_locator(MaxNLocator(4))
        if title in ("max |h|", "max / median", "kurtosis h₀", "kurtosis hₜ", "‖∂v_last/∂vᵢ‖"):
            axis.set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    _mode_legend(figure, _modes(found))
    return figure


def _mode_legend(figure: Figure, modes: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(mode), marker="o", markersize=3, label=MODE_LABELS[mode]) for mode in modes]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(modes))


def _change_figure(modes: Found, labels: Sequence[str] | None, key: str = "change") -> Figure:
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    first = next(iter(modes.values()))[key]
    width = min(14, max(7, 0.2 * len(first[0])))
    height = max(1.6, 0.9 + 0.16 * len(first))
    figure, axes = plt.subplots(len(modes), 1, figsize=(width, height * len(modes) + 0.6), squeeze=False, sharex=True)
    top = max(max(map(max, measured[key])) for measured in modes.values()) or 1.0
    image = None
    for axis, (mode, measured) in zip(axes[:, 0], modes.items(), strict=True):
        image = axis.imshow(measured[key], origin="lower", norm=PowerNorm(0.5, 0, top), cmap="magma", aspect="auto")
        axis.set_title(MODE_LABELS[mode], loc="left")
        axis.set_ylabel("layer")
        _whole(axis)
    if labels is not None:
        axes[-1, 0].set_xticks(range(len(labels)), [_visible(t) for t in labels], rotation=90, fontsize=7)
    else:
        axes[-1, 0].set_xlabel("token of the text")
    figure.colorbar(image, ax=axes, label="change" if key == "change" else "relative change", shrink=0.8)
    return figure


def _length_figure(found: Found) -> Figure:
    import matplotlib.pyplot as plt

    measures = next(iter(found["by_length"].values()))
    shown = [c for c in _MIXING if c[0] in measures and not c[1].startswith("±")]
    across = min(4, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(down, across, figsize=(3 * across, 2.3 * down + 0.5), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    modes = list(dict.fromkeys(mode for of in measures.values() for mode in of))
    lengths = [int(length) for length in found["by_length"]]
    for axis, (name, title, read) in zip(axes.flat, shown, strict=False):
        for mode in modes:
            values = [read(of[name][mode], _depth(of, mode)) for of in found["by_length"].values()]
            axis.plot(lengths, values, "o-", markersize=3, color=_colour(mode), linewidth=1.2)
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    _mode_legend(figure, modes)
    return figure


def _position_figure(positions: Found) -> Figure:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    for mode, spans in positions.items():
        middle = [(s["start"] * (s["end"] - 1)) ** 0.5 for s in spans]
        axis.plot(
            middle, [s["perplexity"] for s in spans], "o-", markersize=4, color=_colour(mode), label=MODE_LABELS[mode]
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("position in the document, tokens")
    axis.set_ylabel("perplexity")
    axis.legend()
    return figure


def _streaming_figure(streaming: Found) -> Figure:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    modes = list(streaming)
    for index, (mode, lines) in enumerate(streaming.items()):
        cached = lines[1:]
        at = [i + (index - (len(modes) - 1) / 2) * 0.8 / len(modes) for i in range(len(cached))]
        axis.bar(at, [s["loss"] for s in cached], 0.76 / len(modes), color=_colour(mode), label=MODE_LABELS[mode])
        axis.axhline(lines[0]["loss"], color=_colour(mode), linestyle="--", linewidth=1)
        axis.set_xticks(range(len(cached)), [f"{s['kept']} + {s['window']}" for s in cached])
    losses = [s["loss"] for lines in streaming.values() for s in lines]
    axis.set_ylim(0.9 * min(losses), max(losses) * 1.03)
    axis.set_xlabel("keys kept at the start + last keys")
    axis.set_ylabel("nats per token (axis does not start at 0)")
    figure.legend(loc="outside upper left", ncols=len(modes))
    return figure


def _checkpoint_figure(checkpoints: Found) -> Figure:
    import matplotlib.pyplot as plt

    points = checkpoints["points"]
    modes = list(points[0]["modes"])
    panels: tuple[tuple[str, Callable[[Found, str], float]], ...] = (
        ("sink rate, % (eps 0.3)", lambda v, m: v[f"sink/rate/0.3/{m}"]),
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
            axis.plot([p["tokens"] for p in points], values, "o-", markersize=3, color=_colour(mode), linewidth=1.2)
        axis.set_xscale("symlog", linthresh=least)
        axis.set_title(title)
        axis.set_xlabel("tokens seen")
    _mode_legend(figure, modes)
    return figure


def scalars(found: Found) -> dict[str, float]:
    """Every figure that is one number, under its metric key."""
    out: dict[str, float] = {}
    for kind, modes in found.get("sinks", {}).items():
        for mode, keys in modes.items():
            for key, r in keys.items():
                rate, mass = (r["rate"], r["mass"]) if key == "0" else (r["rate_placed"], r["mass_placed"])
                prefix = f"probe/{kind}/{mode}" + ("" if key == "0" else f"/key {key}")
                out |= {f"{prefix}/sink_rate/{eps}": _all(rate[eps]) for eps in rate}
                out |= {f"{prefix}/sink_mass": _all(mass), f"{prefix}/loss": r["loss"]}
    for mode in _modes(found):
        for columns in (_STATES, _MIXING):
            for name, title, read in columns:
                if mode in found.get(name, {}):
                    value = read(found[name][mode], _depth(found, mode))
                    if value is not None:
                        out[f"probe/{mode}/{name}/{title} (last layer)"] = value
    return out


def log_to_wandb(found: Found, run_dir: Path, step: int) -> str:
    """Log figures, tables and numbers as one more point of the run's W&B history; returns a line that says where.

    metrics.jsonl, the record of training, is left as it is.
    """
    import wandb
    import yaml
    from PIL import Image

    from train.loggers import WandbConfig, finish_wandb, start_wandb

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = rundir.lock(run_dir)
    try:
        config = yaml.safe_load((run_dir / rundir.CONFIG).read_text())
        tracker = start_wandb(WandbConfig(**(config.get("wandb") or {})), run_dir, {})
        if tracker is None:
            raise ValueError(
                f"--wandb: expected a run with W&B, found wandb.mode: disabled in {run_dir / rundir.CONFIG}"
            )
        row: dict[str, Any] = {"trainer/global_step": step, "train/tokens": _tokens_of(run_dir, step), **scalars(found)}
        with plt.rc_context(dict(STYLE)):
            for name, _, words, figure in figures(found):
                raster = io.BytesIO()
                figure.savefig(raster, format="png", dpi=140)
                plt.close(figure)
                row[f"probe/figure/{name}"] = wandb.Image(Image.open(raster), caption=words)
        for t in tables(found):
            row[f"probe/table/{t.name}"] = wandb.Table(columns=list(t.header), data=t.cells())
        tracker.experiment.log(row, step=tracker.number, commit=True)
        where = (
            tracker.experiment.url
            or f"the offline run in {run_dir}/wandb; upload it with: wandb sync {run_dir}/wandb/*run-*"
        )
        finish_wandb(0)
    finally:
        held.close()
    return f"logged to {where}"


def _tokens_of(run_dir: Path, step: int) -> int:
    points = [p for p in rundir.read_metrics(run_dir / rundir.METRICS) if p["step"] <= step]
    return int(points[-1]["train/tokens"]) if points else 0
