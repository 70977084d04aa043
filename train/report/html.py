"""The report as one HTML page that opens from disk without a network: table, curves, heat maps over time."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sinkbed.train.measure.modes import MODE_LABELS
from sinkbed.train.report.figures import COLOURS, curve, live_modes, mass_scale, number_of_runs, study_figures
from sinkbed.train.report.result import Result, arms_of
from sinkbed.train.report.tables import Line, Section, rows_of, table_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from sinkbed.train.study.file import StudyConfig

_CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4; --accent: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, figcaption { max-width: 75ch; } figcaption, .note { color: var(--soft); font-size: .9rem; }
figure { margin: 0 0 1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; } .words td:nth-child(-n+3) { white-space: normal; min-width: 8.5rem; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
thead th { background: #f3f5f7; border-bottom: 1px solid var(--line); position: sticky; top: 0; }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid var(--accent); }
tbody tr { border-top: 1px solid var(--line); } tbody tr:hover { background: #f8fafb; }
.failed { border-left: 4px solid #D55E00; background: #fdf3ec; padding: .5rem 1rem; }
a { color: var(--accent); }
.drawing { overflow-x: auto; } .drawing svg { max-width: max(100%, 620px); height: auto; }
"""

# Sorts a table by the column whose header is pressed: as numbers where the cell starts with one.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("thead button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const down = button.dataset.order !== "down";
      button.dataset.order = down ? "down" : "up";
      const key = row => {
        const text = row.cells[column].textContent.replace("−", "-"), number = parseFloat(text);
        return Number.isNaN(number) ? text : number;
      };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const x = key(a), y = key(b);
        const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === "number" ? -1 : 1;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
"""

_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 20, "t": 40, "b": 60},
    "legend": {"orientation": "h", "yanchor": "top", "y": -0.18, "x": 0},
    "hovermode": "closest",
}


def page(
    study: StudyConfig,
    results: Sequence[Result],
    summary: Sequence[Line],
    note: str,
    more: Sequence[Section],
    missing: Sequence[str],
) -> str:
    """The page. The only script besides plotly's is the table's sorting."""
    from plotly.offline import get_plotlyjs

    rows = rows_of(results)
    parts = [
        f"<p>{html.escape(study.question)}</p>" if study.question else "",
        "".join(f'<p class="failed">{html.escape(what)}</p>' for what in missing),
        "<h2>Result</h2>",
        table(*table_of(summary), "words"),
        f'<p class="note">{html.escape(note)}</p>',
        *(
            f"<h2>{html.escape(s.heading)}</h2>{table(s.header, s.cells, 'words')}"
            f'<p class="note">{html.escape(s.note)}</p>'
            for s in more
        ),
        "<h2>Sink rate while training</h2>",
        _plot(_curves(results, "sink/rate_eps0.3/{}", "sink rate, % (eps 0.3)")),
        f"<figcaption>{_inputs(results)} Press a legend entry to hide an arm, press it twice to "
        "see it alone. Measured on fewer documents than the table.</figcaption>",
        "<h2>Sink mass while training</h2>",
        _plot(_curves(results, "sink/mass/{}", "mean attention on key 0")),
        drawn("Validation loss per inference mode", study_figures(results, "loss", kind="svg")["loss.svg"]),
        "<h2>Where the sink sits</h2>",
        _plot(_heatmaps(results)),
        "<figcaption>Mean attention on key 0, layers down, heads across, first seed; from left to right: "
        f"{', '.join(MODE_LABELS[m] for m in live_modes(results))}. The slider moves through the measurements of "
        "training; of an arm that was measured at other tokens, the last one before.</figcaption>",
        "<h2>Every measurement</h2>",
        table(tuple(rows[0]), [tuple("" if cell is None else str(cell) for cell in row.values()) for row in rows]),
    ]
    return document(study.title, parts, get_plotlyjs())


def document(title: str, parts: Sequence[str], library: str = "") -> str:
    """A page of its own: heading, parts, tables that sort; `library` is a script that the parts need."""
    scripts = f"<script>{library}</script>" if library else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style>{scripts}</head>"
        f"<body><main><h1>{html.escape(title)}</h1>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    head = "".join(f'<th scope="col"><button type="button">{html.escape(name)}</button></th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def drawn(title: str, svg: bytes, words: str = "") -> str:
    """A drawing under a heading."""
    text = svg.decode()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1
    )
    return (
        f"<h2>{html.escape(title)}</h2><figure><div class='drawing'>{drawing}</div>"
        f"<figcaption>{html.escape(words)}</figcaption></figure>"
    )


def _plot(figure: go.Figure) -> str:
    config = {"responsive": True, "displaylogo": False}
    return f"<figure>{figure.to_html(config, auto_play=False, include_plotlyjs=False, full_html=False)}</figure>"


def _curves(results: Sequence[Result], key: str, title: str) -> go.Figure:
    import plotly.graph_objects as go

    figure, largest = go.Figure(), 0.0
    for index, arm in enumerate(arms_of(results)):
        of_arm = {"name": arm, "legendgroup": arm}
        colour = COLOURS[index % len(COLOURS)]
        for mode, dash in zip(live_modes(results), ("solid", "dash"), strict=False):
            tokens, values = curve(results, arm, key.format(mode))
            if dash == "solid" and values and values[0].count > 1:  # the interval as one filled outline
                figure.add_scatter(
                    **of_arm, x=[*tokens, *reversed(tokens)], showlegend=False, mode="lines", hoverinfo="skip",
                    y=[*(v.high for v in values), *(max(0.0, v.low) for v in reversed(values))],
                    fill="toself", fillcolor=colour, line_width=0, opacity=0.1,
                )  # fmt: skip
            largest = max([largest, *(v.mean for v in values)])
            figure.add_scatter(
                **of_arm, x=tokens, y=[v.mean for v in values], showlegend=dash == "solid",
                mode="lines+markers", line={"color": colour, "dash": dash}, marker_size=5,
                hovertemplate=f"{arm}, {MODE_LABELS[mode]}<br>%{{x:,}} tokens: %{{y:.3g}}<extra></extra>",
            )  # fmt: skip
    # Of few seeds the intervals are wide: the axis is for the means.
    figure.update_yaxes(range=[-0.03 * largest, 1.25 * largest] if largest else None)
    figure.update_layout(**_LAYOUT, height=440, xaxis_title="tokens seen", yaxis_title=title)
    return figure


def _inputs(results: Sequence[Result]) -> str:
    """What the lines and shades of the curves are."""
    lines = zip(("Solid", "Dashed"), live_modes(results), strict=False)
    inputs = " ".join(f"{line}: {MODE_LABELS[mode]}." for line, mode in lines)
    runs = number_of_runs(results)
    shade = "Shaded: 95 % interval of the mean of the solid line." if runs != "one run an arm" else ""
    return f"{inputs} {shade} {runs.capitalize() + ': no interval.' if runs else ''}"


def _maps(result: Result, mode: str) -> dict[int, list[list[float]]]:
    """Tokens -> map of a run in a live mode."""
    return {p["train/tokens"]: p[key] for p in result.points if (key := f"sink/heatmap/{mode}") in p}


def _heatmaps(results: Sequence[Result]) -> go.Figure:
    """One map an arm and live mode; frames are the measurements during training."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    first = [next(r for r in results if r.arm == arm) for arm in arms_of(results)]
    modes = [m for m in live_modes(results) if all(_maps(r, m) for r in first)]
    if not modes:
        return go.Figure(layout={**_LAYOUT, "title": "no inference mode was measured live in every arm"})
    series = [_maps(r, m) for r in first for m in modes]
    # Runs of another batch are measured at other tokens: the frames are those of the fewest, and the ends of all.
    times = sorted({*min(series, key=len), *(max(s) for s in series)})
    # One title a row: two would run into each other on a narrow screen.
    titles = [r.arm if column == 0 else "" for r in first for column in range(len(modes))]
    figure = make_subplots(
        rows=len(first), cols=len(modes), subplot_titles=titles, vertical_spacing=0.45 / max(len(first), 5)
    )
    frames = {
        time: [
            go.Heatmap(
                z=s[max((t for t in s if t <= time), default=min(s))],
                coloraxis="coloraxis",
                hovertemplate="layer %{y}, head %{x}: %{z:.3f}",
            )
            for s in series
        ]
        for time in times
    }
    for index, trace in enumerate(frames[times[-1]]):
        figure.add_trace(trace, row=index // len(modes) + 1, col=index % len(modes) + 1)
    figure.frames = [go.Frame(data=data, name=str(t), traces=list(range(len(series)))) for t, data in frames.items()]
    at_once = {"mode": "immediate", "frame": {"duration": 0}, "transition": {"duration": 0}}
    steps = [{"label": f"{t:,}", "method": "animate", "args": [[str(t)], at_once]} for t in times]
    scale = mass_scale([map_ for s in series for map_ in s.values()])
    figure.update_layout(
        **{**_LAYOUT, "margin": {"l": 40, "r": 20, "t": 40, "b": 90}},
        height=110 * len(first) + 200,
        coloraxis={"colorscale": "Inferno", "cmin": 0, "cmax": scale, "colorbar": {"title": "mass", "thickness": 12}},
        sliders=[{"active": len(times) - 1, "currentvalue": {"prefix": "tokens: "}, "steps": steps}],
    )
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_xaxes(dtick=1, showticklabels=False)
    figure.update_annotations(font_size=12, x=0, xanchor="left")
    return figure
