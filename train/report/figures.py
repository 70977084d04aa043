"""Figures: panels, and how they become files (SVG, PDF, PNG) and drawings on a page.

A picture is a few panels on one sheet, for a paper; a page cuts them out, so that they stand beside or below each other
as the window allows. What belongs to an arm, or a mode, is one series: it has one look everywhere, and a page hides
it by its id, `series:LABEL`.
"""

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from sinkbed.train.measure.modes import MODE_LABELS

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
    "axes.titley": 1.0,  # looking for room above the ticks takes a tenth of a report
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "font.sans-serif": ["DejaVu Sans"],
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


def mode_panels(
    parts: Mapping[str, Any], draw: Callable[[Any, Axes], None], title: str = "{}", **size: float
) -> list[Panel]:
    """A panel a mode, of what is the mode's; `title` with {} for its name."""
    return [Panel(title.format(MODE_LABELS[mode]), partial(draw, part), **size) for mode, part in parts.items()]


@dataclass(frozen=True)
class Picture:
    """Panels under a title; `name` is that of its files, `words` say what is seen."""

    name: str
    title: str
    words: str
    panels: Sequence[Panel]
    across: int = 3
    """Panels beside each other in the files."""


@dataclass(frozen=True)
class Drawing:
    """A picture that was drawn."""

    picture: Picture
    files: dict[str, bytes]
    """File name -> content, the same bytes each time."""
    boxes: Sequence[tuple[float, float, float, float]]
    """Of each panel in the SVG file: left, that of its column, top, right, bottom; in points."""
    series: dict[str, tuple[str, str]]
    """Label -> colour and marker."""


def draw(picture: Picture, formats: Sequence[str] = ("svg", "pdf")) -> Drawing:
    """All panels on one sheet with a legend, in formats among svg, pdf and png."""
    panels, across = picture.panels, min(picture.across, len(picture.panels))
    heights = [max(p.height for p in panels[at : at + across]) for at in range(0, len(panels), across)]
    width, height = across * max(p.width for p in panels), sum(heights)
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), dpi=72, layout="constrained")
        grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
        parts: list[list[Axes]] = []  # of each panel: its axes, with the bars that explain colours
        handles: dict[str, Any] = {}
        for number, panel in enumerate(panels):
            before = len(figure.axes)
            axis = figure.add_subplot(grid[number])
            panel.draw(axis)
            axis.set_title(panel.title)
            parts.append(figure.axes[before:])
            for part in parts[-1]:
                part.set_gid(f"panel:{number}")
            handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if len(handles) > 1:
            columns = max(1, int(width / 2.3))
            height += 0.2 * -(-len(handles) // columns)
            figure.set_figheight(height)
            figure.legend(handles.values(), handles, loc="outside lower left", ncols=columns)
        figure.get_layout_engine().execute(figure)  # type: ignore[union-attr]
        figure.set_layout_engine(None)  # once for all formats
        bounds = [Bbox.union([box for part in own if (box := part.get_tightbbox())]) for own in parts]
        files = {f"{picture.name}.{kind}": _saved(figure, kind) for kind in formats}
    lefts = [min(box.x0 for box in bounds[column::across]) for column in range(across)]
    boxes = [(lefts[n % across], 72 * height - b.y1, b.x1, 72 * height - b.y0) for n, b in enumerate(bounds)]
    series = {
        (handle.get_gid() or "").removeprefix("series:"): (handle.get_color(), MARKERS.get(handle.get_marker(), "■"))
        for handle in handles.values()
    }
    return Drawing(picture, files, boxes, series)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"dpi": 140, "facecolor": "white"}
    if kind != "png":  # without a date a figure is the same bytes each time
        options = {"metadata": {"Date" if kind == "svg" else "CreationDate": None}}
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def embedded(drawing: Drawing) -> list[str]:
    """The panels, cut out of the SVG file, as elements of a page: they take its theme and name their series."""
    picture = drawing.picture
    svg = drawing.files[f"{picture.name}.svg"].decode().replace(INK, "currentColor").replace(LINE, "var(--line)")
    svg = re.sub(r'<g id="series:([^"]*)">', r'<g class="series" data-series="\1"><title>\1</title>', svg)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # which other drawings have too
    shared = re.findall(r"^ <defs>.*?^ </defs>", svg, re.M | re.S)
    width = max(right - left for left, _, right, _ in drawing.boxes) + 4
    elements = []
    for number, (panel, (left, top, _, bottom)) in enumerate(zip(picture.panels, drawing.boxes, strict=True)):
        parts = re.findall(rf'^  <g id="panel:{number}">(.*?)^  </g>', svg, re.M | re.S)
        content = re.sub(r"\n\s*", "\n", "".join([*(f"<g>{part}</g>" for part in parts), *shared]))
        elements.append(
            f'<svg role="img" aria-label="{html.escape(f"{picture.title}: {panel.title}")}" '
            f'viewBox="{left - 2:.1f} {top - 2:.1f} {width:.1f} {bottom - top + 4:.1f}">{content}</svg>'
        )
    return elements


def look(index: int) -> tuple[str, str]:
    """Colour and marker of the n-th series; 64 of them differ."""
    return COLOURS[index % 8], tuple(MARKERS)[(index + index // 8) % 8]


def drawable(text: str) -> str:
    """A text with what the font of figures has no glyph for written as its number: 你 as U+4F60.

    A space goes before `_`, with which a label begins that legends leave out.
    """
    glyphs = get_font(findfont(FontProperties()))
    written = "".join(c if glyphs.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in text)
    written = written.replace("$", r"\$")  # which would begin a formula
    return f" {written}" if written.startswith("_") else written


def line(axis: Axes, x: Sequence[float], y: Sequence[float], label: str, look: tuple[str, str], **options: Any) -> None:
    """A curve with markers, at most a dozen of them."""
    colour, marker = look
    options = {"marker": marker, "linewidth": 1.4, "markersize": 4, "markevery": max(1, len(x) // 12), **options}
    axis.plot(x, y, color=colour, label=drawable(label), gid=f"series:{label}", **options)


def token_axis(axis: Axes, tokens: Sequence[float]) -> None:
    """Tokens seen, on a logarithmic axis but for the start, which has no logarithm."""
    axis.set_xlabel("tokens seen")
    positive = sorted(t for t in tokens if t > 0)
    if not positive:
        return
    first, last = positive[0], positive[-1]
    axis.set_xscale("symlog", linthresh=first, linscale=0.3)
    steps = (1, 2, 3, 5) if last / first < 20 else (1, 3) if last / first < 3000 else (1,)
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    ticks = [step * 10**power for power in powers for step in steps if 1.4 * first <= step * 10**power <= 1.05 * last]
    axis.set_xticks([*([0] if min(tokens) <= 0 else [first]), *ticks])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    axis.xaxis.set_minor_locator(NullLocator())


def short(number: float) -> str:
    """1,843,200 as 1.8M."""
    return EngFormatter(sep="", places=1)(number).replace(".0", "")


def whole_ticks(*axes: Axis) -> None:
    """Ticks at whole numbers; −1 is what the first block reads."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axis.set_major_formatter(FuncFormatter(lambda at, _: "in" if at == -1 else f"{at:g}"))


def named_rows(axis: Axes, names: Sequence[str], at: Sequence[float] | None = None) -> None:
    """Names at the left, from the top down; long ones on several lines."""
    axis.set_yticks(range(len(names)) if at is None else at, ["\n".join(textwrap.wrap(drawable(n), 24)) for n in names])
    axis.tick_params(axis="y", length=0)


def heat(axis: Axes, values: Any, label: str, top: float, *, root: bool = False, **options: Any) -> None:
    """A map from 0 to `top`, its colours explained; `root`: they go by the square root."""
    options = {"cmap": "inferno", "aspect": "auto", "interpolation": "none", **options}
    image = axis.imshow(np.asarray(values, dtype=float), norm=PowerNorm(0.5 if root else 1, 0, top), **options)
    axis.figure.colorbar(image, ax=axis, label=label, aspect=30, pad=0.02)


def mass_scale(maps: Sequence[Any]) -> float:
    """Top of the colour scale that all maps share: the largest mass, up to the next tenth."""
    largest = max((float(np.max(values, initial=0)) for values in maps), default=0)
    return max(0.1, min(1.0, math.ceil(10 * largest - 1e-9) / 10))


def stacked(maps: Mapping[str, Any]) -> tuple[np.ndarray, list[float]]:
    """Maps under each other with a gap between, [rows, widest], and the middle row of each."""
    widest = max(np.shape(values)[1] for values in maps.values())
    gap = [((0, 1), (0, widest - np.shape(values)[1])) for values in maps.values()]
    blocks = [np.pad(np.asarray(v, float), g, constant_values=np.nan) for v, g in zip(maps.values(), gap, strict=True)]
    ends = np.cumsum([len(block) for block in blocks])
    middles = [float(end) - len(block) / 2 - 1 for end, block in zip(ends, blocks, strict=True)]
    return np.concatenate(blocks)[:-1], middles
