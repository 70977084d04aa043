"""Pages that open from disk without a network: pictures with their legends, tables, parts that fold."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sinkbed.train.report.effects import SIGNS, Outcome
from sinkbed.train.report.figures import INK, Drawing, embedded
from sinkbed.train.report.table import Table

_CSS, _SCRIPT = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
_MOST_DIGITS = 16
"""Characters up to which a cell that starts like a number is one."""
_WIDE = 6
"""Inches from which on a panel scrolls on a narrow screen instead of getting smaller."""


def document(title: str, parts: Sequence[str]) -> str:
    """A page of its own: a heading and its parts."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of a kind that page.css knows; empty where there is no text."""
    return f'<p class="{kind}">{html.escape(text)}</p>' if text else ""


def notices(lines: Sequence[str]) -> str:
    """What the reader must know first; more than two lines fold."""
    items = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
    if len(lines) > 2:
        items = folded(f"{len(lines)} are missing or unfinished", items)
    return f'<div class="notice">{items}</div>' if lines else ""


def section(title: str, *parts: str) -> str:
    """Parts under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def folded(title: str, *parts: str) -> str:
    """Parts that unfold."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(parts)}</details>"


def links(places: Mapping[str, tuple[str, str]]) -> str:
    """A list of pages beside this one: what each is called, where it is, and a line about it."""
    items = (
        f'<li><a href="{html.escape(where)}">{html.escape(name)}</a>: {html.escape(about)}</li>'
        for name, (where, about) in places.items()
    )
    return f"<ul>{''.join(items)}</ul>"


def table(content: Table) -> str:
    """A table that sorts by the column whose header is pressed, and scrolls where it is wide; its note below."""
    cells = content.cells()
    words = [any(_is_text(row[column]) for row in cells) for column in range(len(content.header))]
    kinds = [' class="words"' if is_text else "" for is_text in words]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{html.escape(name)}</button></th>'
        for kind, name in zip(kinds, content.header, strict=True)
    )
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{html.escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in cells
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(content.title)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{paragraph(content.note)}"
    )


def _is_text(cell: str) -> bool:
    return len(cell) > _MOST_DIGITS or (cell[:1].isalpha() and cell not in ("nan", "not seen", "input"))


def picture(drawing: Drawing, under: Callable[..., str] = section) -> str:
    """Panels beside or below each other, with a legend that hides and shows what belongs together; under its title."""
    content, series = drawing.picture, drawing.series
    chips = "".join(
        f'<label class="chip"><input type="checkbox" checked value="{html.escape(name)}">'
        f'<b aria-hidden="true" style="color:{colour}">{marker}</b>{html.escape(name)}</label>'
        for name, (colour, marker) in series.items()
    ).replace(INK, "inherit")
    if len(series) > 2:
        for on, word in enumerate(("hide all", "show all")):
            chips += f'<button type="button" class="chip" data-all="{on}">{word}</button>'
    legend = f"<fieldset><legend>Shown (press to hide)</legend>{chips}</fieldset>" if len(series) > 1 else ""
    panels = "".join(
        f'<div class="wide" tabindex="0" style="--least:{60 * panel.width:.0f}px">{svg}</div>'
        if panel.width > _WIDE
        else f"<div>{svg}</div>"
        for panel, svg in zip(content.panels, embedded(drawing), strict=True)
    )
    panels = f'<div class="panels" style="--across:{content.across}">{panels}</div>'
    return under(content.title, legend, panels, paragraph(content.words))


def effects(outcomes: Sequence[Outcome]) -> str:
    """A list of the expected effects: the sign of its verdict, and what it is of."""
    items = []
    for item in outcomes:
        (sign, kind), cells = SIGNS[item.finding], item.columns()
        published = f"published {cells['published']}" if cells["published"] else ""
        details = (f"{item.subtraction}: {item.measured}, expected {cells['expected']}", published, cells["source"])
        items.append(
            f'<li class="{kind}"><b title="{item.verdict}" aria-hidden="true">{sign}</b><div>{html.escape(item.name)}: '
            f"{item.verdict}<small>{html.escape('; '.join(filter(None, details)))}</small></div></li>"
        )
    return f'<ul class="effects">{"".join(items)}</ul>'
