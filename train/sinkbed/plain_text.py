"""Tables for the terminal, CSV and Markdown, in which a text stays a text: no markup, no formula, no HTML."""

import csv
import html
import io
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(width: int) -> "Console":
    """The terminal; a pipe or a log, which has no width of its own, gets `width` columns."""
    from rich.console import Console

    terminal = Console(markup=False, emoji=False, highlight=False)
    return terminal if terminal.is_terminal else Console(markup=False, emoji=False, highlight=False, width=width)


def visible(text: str) -> str:
    """A text without characters that move a terminal's cursor or change its colours: they are written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is none of those known."""
    near = get_close_matches(name, [*known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file; None is an empty cell. A text that a spreadsheet would take for a formula begins with `'`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_no_formula(value) for value in row] for row in rows)
    return buffer.getvalue()


def _no_formula(value: Any) -> Any:
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def csv_of(records: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Some columns of records as a CSV file; a record that lacks one has an empty cell."""
    return csv_text(columns, ([record.get(name) for name in columns] for record in records))


def markdown(text: str) -> str:
    """A text in Markdown, on one line and without HTML."""
    return html.escape(" ".join(text.split()), quote=False)


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    rows = ["| " + " | ".join(markdown(cell).replace("|", "\\|") for cell in line) + " |" for line in (header, *cells)]
    return [rows[0], "|" + " --- |" * len(header), *rows[1:]]
