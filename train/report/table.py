"""A table: of numbers or text, for the terminal, Markdown, CSV and a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from sinkbed.plain_text import console, visible
from sinkbed.train.report.result import fixed

Row = Sequence[str | float | int | None]


@dataclass(frozen=True)
class Table:
    """Rows under a header, with a title over them and a note below."""

    name: str
    """Of its file, where it has one."""
    title: str
    header: tuple[str, ...]
    rows: Sequence[Row]
    note: str = ""
    keys: tuple[str, ...] = ()
    """Names of the columns in the CSV file, where the titles are formulas."""

    def cells(self) -> list[tuple[str, ...]]:
        """Rows as text: four significant digits."""
        return [tuple(_cell(value) for value in row) for row in self.rows]

    def print(self, width: int = 170) -> None:
        """To the terminal."""
        from rich import box
        from rich.table import Table as Drawn

        drawn = Drawn(title=visible(self.title), title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
        drawn.caption = self.note or None
        for name in self.header:
            drawn.add_column(name, justify="left" if name in _WORDS else "right", overflow="fold")
        for row in self.cells():
            drawn.add_row(*row)
        console(width).print(drawn)


_WORDS = ("arm", "model", "mask in training", "BOS in training", "mode", "token", "keys")


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
