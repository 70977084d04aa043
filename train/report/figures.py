"""Figures: panels, and how they become files (SVG, PDF, PNG) and drawings on a page.

A picture is a few panels. Its files show them on one sheet, for a paper; on a page each is a drawing of its own, so
that they stand beside or below each other as the window allows. What belongs to an arm, or a mode, is one series: it
has one look everywhere, and a page can hide it.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkbed.train.measure.modes import MODE_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, LINE = "#1b1f24", "#d9dee4"
"""Text and axes, and lines in the background: a page gives them the colours of its theme."""
# Okabe and Ito's colours, which readers with colour-blindness tell apart.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#7A7A7A", INK)
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
"""Markers, and the characters that stand for them in a page's legend."""
MODE_LOOKS = {
    mode: (COLOURS[n], "os^Dv"[i]) for i, (mode, n) in enumerate(zip(MODE_LABELS, (0, 2, 6, 3, 5), strict=True))
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "sinkbed",
}


@dataclass(frozen=True)
class Panel:
    """One plot: its title, what draws it on an axis, and its size in inches."""

    title: str
    draw: Callable[[Axes], None]
    height: float = 2.9
    width: float = 4.6


@dataclass(frozen=True)
class Picture:
    """Panels under a title; `name` is that of its files, `words` say what is seen."""

    name: str
    title: str
    words: str
    panels: Sequence[Panel]
    across: int = 3
    """Panels beside each other in the files."""


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib without a window, in the style of all our figures."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def files(pictures: Sequence[Picture], formats: Sequence[str] = ("svg", "pdf")) -> dict[str, bytes]:
    """File name -> content of every picture, the same bytes each time; formats: svg, pdf, png."""
    out: dict[str, bytes] = {}
    with drawing():
        for picture in pictures:
            sheet = _sheet(picture)
            out |= {f"{picture.name}.{kind}": _saved(sheet, kind) for kind in formats}
    return out


def _sheet(picture: Picture) -> Figure:
    """All panels of a picture in one figure, with a legend."""
    import matplotlib.pyplot as plt

    panels = picture.panels
    across = min(picture.across, len(panels))
    down = -(-len(panels) // across)
    heights = [max(p.height for p in panels[row * across : (row + 1) * across]) for row in range(down)]
    width = across * max(p.width for p in panels)
    figure, axes = plt.subplots(
        down, across, figsize=(width, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    labels: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel.draw(axis)
        axis.set_title(panel.title)
        labels |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if len(labels) > 1:
        columns = max(1, int(width / 2.3))
        figure.set_figheight(sum(heights) + 0.2 * -(-len(labels) // columns))
        figure.legend(labels.values(), labels, loc="outside lower left", ncols=columns)
    return figure


def _saved(figure: Figure, kind: str) -> bytes:
    """A figure as a file, and closed for pyplot; printed by its canvas, as `savefig` would draw it twice."""
    import matplotlib.pyplot as plt
    from matplotlib.backends import backend_agg, backend_pdf, backend_svg

    buffer = io.BytesIO()
    figure.set_dpi(140 if kind == "png" else 72)
    figure.set_facecolor("white" if kind == "png" else "none")
    if kind == "svg":  # without dates a figure is the same bytes each time
        backend_svg.FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    elif kind == "pdf":
        backend_pdf.FigureCanvasPdf(figure).print_pdf(buffer, metadata={"CreationDate": None})
    else:
        backend_agg.FigureCanvasAgg(figure).print_png(buffer)
    figure.set_layout_engine("none")  # laid out once for all formats
    plt.close(figure)
    return buffer.getvalue()


def embedded(picture: Picture) -> tuple[list[str], dict[str, tuple[str, str]]]:
    """The panels as SVG elements of a page, and label -> (colour, marker) of their series."""
    import matplotlib.pyplot as plt

    drawings, series = [], {}
    with drawing():
        for panel in picture.panels:
            figure, axis = plt.subplots(figsize=(panel.width, panel.height))
            panel.draw(axis)
            figure.suptitle(panel.title, x=0.01, ha="left", size=10, weight="bold")
            handles: list[Any] = axis.get_legend_handles_labels()[0]
            for handle in handles:
                name = (handle.get_gid() or "").removeprefix("series:")
                series[name] = (handle.get_color(), MARKERS.get(handle.get_marker(), "■"))
            drawings.append(_for_page(_saved(figure, "svg").decode(), f"{picture.title}: {panel.title}"))
    return drawings, series


def _for_page(svg: str, label: str) -> str:
    """An SVG file as an element that takes the theme of its page, names its series, and has no ids that others have."""
    svg = re.sub(r"<metadata>.*?</metadata>|\n\s*", lambda found: "" if found[0][0] == "<" else "\n", svg, flags=re.S)
    svg = re.sub(
        r'<g id="series:([^"]*)">', r'<g class="series" data-series="\1"><title>\1</title>', svg[svg.index("<svg") :]
    )
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', "", svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    )
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def look(index: int) -> tuple[str, str]:
    """Colour and marker of the n-th series; 64 of them differ."""
    return COLOURS[index % 8], tuple(MARKERS)[(index + index // 8) % 8]


def drawable(text: str) -> str:
    """A text with what the font of figures has no glyph for written as its number: 你 as U+4F60."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties()))
    written = "".join(c if glyphs.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)
    return written.replace("$", r"\$")  # which would begin a formula


def series_id(label: str) -> str:
    """The id of what belongs to a series, by which a page hides it."""
    return f"series:{label}"


def line(axis: Axes, x: Sequence[float], y: Sequence[float], label: str, look: tuple[str, str], **options: Any) -> None:
    """A curve with markers, at most a dozen of them."""
    colour, marker = look
    options = {"marker": marker, "linewidth": 1.4, "markersize": 4, "markevery": max(1, len(x) // 12), **options}
    axis.plot(x, y, color=colour, label=drawable(label), gid=series_id(label), **options)


def token_axis(axis: Axes, tokens: Sequence[float]) -> None:
    """Tokens seen, on a logarithmic axis but for the start, which has no logarithm."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_xlabel("tokens seen")
    positive = sorted(t for t in tokens if t > 0)
    if not positive:
        return
    first, last = positive[0], positive[-1]
    axis.set_xscale("symlog", linthresh=first, linscale=0.3)
    steps = (1, 3) if last / first < 3000 else (1,)
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    ticks = [step * 10**power for power in powers for step in steps if 1.4 * first <= step * 10**power <= 1.05 * last]
    axis.set_xticks([*([0] if min(tokens) <= 0 else [first]), *ticks])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    axis.xaxis.set_minor_locator(NullLocator())


def short(number: float) -> str:
    """1,843,200 as 1.8M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="", places=1)(number).replace(".0", "")


def whole_ticks(*axes: Axis) -> None:
    """Ticks at whole numbers; −1 is what the first block reads."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.set_major_formatter(FuncFormatter(lambda at, _: "in" if at == -1 else f"{at:g}"))


def named_rows(axis: Axes, names: Sequence[str], at: Sequence[float] | None = None) -> None:
    """Names at the left, from the top down; long ones on several lines."""
    axis.set_yticks(range(len(names)) if at is None else at, ["\n".join(textwrap.wrap(drawable(n), 24)) for n in names])
    axis.tick_params(axis="y", length=0)


def heat(axis: Axes, values: Any, label: str, top: float, *, root: bool = False, **options: Any) -> None:
    """A map from 0 to `top`, its colours explained; `root`: they go by the square root."""
    from matplotlib.colors import Normalize, PowerNorm

    norm = PowerNorm(0.5, 0, top) if root else Normalize(0, top)
    options = {"cmap": "inferno", "aspect": "auto", "interpolation": "none", **options}
    image = axis.imshow(np.asarray(values, dtype=float), norm=norm, **options)
    axis.figure.colorbar(image, ax=axis, label=label, aspect=30, pad=0.02)


def mass_scale(maps: Sequence[Any]) -> float:
    """Top of the colour scale that all maps share: the largest mass, up to the next tenth."""
    largest = max(float(np.nanmax(values, initial=0)) for values in maps)
    return max(0.1, min(1.0, math.ceil(10 * largest - 1e-9) / 10))


def stacked(maps: Mapping[str, Any]) -> tuple[np.ndarray, list[float]]:
    """Maps under each other with a gap between, [rows, widest], and the middle row of each."""
    blocks = [np.atleast_2d(np.asarray(values, dtype=float)) for values in maps.values()]
    widest = max(block.shape[1] for block in blocks)
    rows: list[np.ndarray] = []
    middles = []
    for block in blocks:
        middles.append(len(rows) + (len(block) - 1) / 2)
        rows += [np.pad(row, (0, widest - len(row)), constant_values=np.nan) for row in block]
        rows.append(np.full(widest, np.nan))
    return np.stack(rows[:-1]), middles
