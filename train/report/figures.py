"""Figures of a study: the picture of the result, curves, heat maps, losses."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.intervals import Interval
from sinkbed.train.report.result import Result, arms_of, common_modes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which readers with colour-blindness tell apart; one an arm, by order.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#7A7A7A", "#000000")
MODE_COLOURS = {mode: COLOURS[n] for mode, n in zip(MODE_LABELS, (0, 2, 6, 3, 5), strict=True)}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "sinkbed",
}


def drawable(text: str) -> str:
    """A text with what the font of figures has no glyph for written as its number: 你 as U+4F60."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties()))
    return "".join(c if glyphs.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)


def curve(results: Sequence[Result], arm: str, key: str) -> tuple[list[int], list[Interval]]:
    """Tokens, and the mean over seeds of a metric of an arm with its interval, at the steps every seed has."""
    series = [{p["train/tokens"]: p[key] for p in r.points if p.get(key) is not None} for r in results if r.arm == arm]
    tokens = sorted(set.intersection(*(set(s) for s in series))) if series else []
    return tokens, [Interval.of([s[t] for s in series]) for t in tokens]


def live_modes(results: Sequence[Result]) -> list[str]:
    """The two inference modes that the curves show: with the first token, and text; those that were measured live."""
    measured = {key.rpartition("/")[2] for r in results for p in r.points for key in p if key.startswith("sink/mass/")}
    first = [mode for mode in ("bos", "as_trained") if mode in measured][:1]
    return first + [mode for mode in ("text",) if mode in measured]


def number_of_runs(results: Sequence[Result]) -> str:
    """What a figure must say of arms that ran once; nothing where all ran more often."""
    counts = [sum(r.arm == arm for r in results) for arm in arms_of(results)]
    return {True: "one run an arm", False: "some arms ran once"}[max(counts) == 1] if min(counts) == 1 else ""


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib without a window, in the style of all our figures."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def image(figure: Figure, kind: Literal["png", "svg"] = "png") -> bytes:
    """A figure as a file, the same bytes each time; inside `drawing`, which need not keep it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=140, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)
    return buffer.getvalue()


def study_figures(results: Sequence[Result], *names: str, kind: Literal["png", "svg"] = "png") -> dict[str, bytes]:
    """File name -> figure: the result, curves, heat maps and losses, or those named."""
    with drawing():
        return {f"{name}.{kind}": image(_FIGURES[name](results), kind) for name in names or _FIGURES}


def _result(results: Sequence[Result]) -> Figure:
    """Sink rate with and without BOS, and what removing BOS costs, an arm a line."""
    import matplotlib.pyplot as plt

    from sinkbed.train.report.effects import figures, reference_mode

    arms = arms_of(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.42 * len(arms) + 1.5), sharey=True)
    modes = {m for r in results for m in r.final["modes"]}
    inputs = [*(m for m in ("bos", "as_trained") if m in modes)][:1] + [m for m in ("text",) if m in modes]
    runs = f" ({few})" if (few := number_of_runs(results)) else ""
    for row, arm in enumerate(arms):
        of_arm = [r for r in results if r.arm == arm]
        for offset, mode in zip((-0.18, 0.18), inputs, strict=False):
            values = [r.value(mode, "0.3") for r in of_arm if mode in r.final["modes"]]
            if values:
                label = MODE_LABELS[mode] if row == 0 else None
                left.barh(row + offset, fmean(values), 0.34, color=MODE_COLOURS[mode], label=label)
                if len(values) > 1:
                    left.plot(values, [row + offset] * len(values), "|", color="black", markersize=6)
        gaps = list(figures(results, arm, "loss_gap", "text").values())
        if gaps:
            right.barh(row, fmean(gaps), 0.5, color="#444444")
            if len(gaps) > 1:
                right.plot(gaps, [row] * len(gaps), "|", color="#D55E00", markersize=8)
    left.set_yticks(range(len(arms)), [drawable(arm) for arm in arms])
    left.invert_yaxis()
    left.set_xlabel(f"sink rate on the first token, % (eps 0.3, T {results[0].final['sink_tokens']})")
    figure.legend(loc="outside upper left", ncols=2)
    left.set_title(f"Where the sink is{runs}")
    reference = reference_mode(modes)
    right.set_xlabel(f"loss(text) − loss({MODE_LABELS.get(reference or '', 'text')}), nats per token")
    what = "removing BOS" if reference == "bos" else "leaving out the placed token"
    right.set_title(f"What {what} costs{runs}")
    return figure


def _curves(results: Sequence[Result]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    keys = ("sink/rate_eps0.3/{}", "sink/mass/{}", "val/loss/{}")
    titles = ("sink rate, % (eps 0.3)", "sink mass", "validation loss, nats per token")
    for axis, key, title in zip(axes, keys, titles, strict=True):
        for index, arm in enumerate(arms_of(results)):
            for mode, style in zip(live_modes(results), ("-", "--"), strict=False):
                tokens, values = curve(results, arm, key.format(mode))
                means, colour = [v.mean for v in values], COLOURS[index % len(COLOURS)]
                axis.plot(tokens, means, style, color=colour, label=drawable(arm) if style == "-" else None)
        axis.set_xlabel("tokens seen" + (f" ({runs})" if (runs := number_of_runs(results)) else ""))
        axis.set_title(title)
    for mode, style in zip(live_modes(results), ("k-", "k--"), strict=False):
        axes[0].plot([], [], style, label=f"input: {MODE_LABELS[mode]}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def mass_scale(maps: Sequence[list[list[float]]]) -> float:
    """Top of the colour scale that all maps share: the largest mass, up to the next tenth."""
    largest = max(value for map_ in maps for row in map_ for value in row)
    return min(1.0, math.ceil(10 * largest + 1e-9) / 10)


def _heatmaps(results: Sequence[Result]) -> Figure:
    """Sink mass of the first seed, layers down, heads across; one column a mode, one row an arm."""
    import matplotlib.pyplot as plt

    arms = arms_of(results)
    first = {arm: next(r for r in results if r.arm == arm) for arm in arms}
    # Where key 0 is hidden there is nothing to draw.
    modes = [m for m in common_modes(results) if m != "first_key_masked"] or common_modes(results)
    figure, axes = plt.subplots(
        len(arms), len(modes), figsize=(3 * len(modes) + 1.5, 0.95 * len(arms) + 0.6), squeeze=False
    )
    image = None
    scale = mass_scale([first[arm].final["modes"][mode]["mass"] for arm in arms for mode in modes])
    for row, arm in enumerate(arms):
        for column, mode in enumerate(modes):
            axis = axes[row][column]
            values = first[arm].final["modes"][mode]["mass"]
            image = axis.imshow(values, vmin=0, vmax=scale, cmap="inferno", aspect="auto")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(MODE_LABELS[mode])
            if column == 0:
                axis.set_ylabel(drawable(arm), rotation=0, ha="right", va="center")
    assert image is not None
    figure.colorbar(image, ax=axes, shrink=0.6, label="mass on key 0 (layers down, heads across)")
    return figure


def _losses(results: Sequence[Result]) -> Figure:
    import matplotlib.pyplot as plt

    arms, modes = arms_of(results), common_modes(results)
    figure, axis = plt.subplots(figsize=(8, 0.42 * len(arms) + 1.3))
    height = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        means = [Interval.of([r.value(mode, "loss") for r in results if r.arm == arm]) for arm in arms]
        rows = [row + (index - (len(modes) - 1) / 2) * height for row in range(len(arms))]
        axis.barh(
            rows,
            [v.mean for v in means],
            height * 0.9,
            xerr=[v.half if v.count > 1 else 0 for v in means] if any(v.count > 1 for v in means) else None,
            error_kw={"elinewidth": 0.8},
            color=MODE_COLOURS[mode],
            label=MODE_LABELS[mode],
        )
    losses = [r.value(m, "loss") for r in results for m in modes]
    axis.set_xlim(0.9 * min(losses), max(losses) + 0.05 * min(losses))
    axis.set_yticks(range(len(arms)), [drawable(arm) for arm in arms])
    axis.invert_yaxis()
    runs = f"; {few}" if (few := number_of_runs(results)) else ""
    axis.set_xlabel(f"validation loss, nats per token (axis does not start at 0{runs})")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


_FIGURES: dict[str, Callable[[Sequence[Result]], Figure]] = {
    "result": _result,
    "curves": _curves,
    "heatmaps": _heatmaps,
    "loss": _losses,
}
