"""A text stays a text in the terminal, in CSV and in Markdown."""

import csv
import io
import sys

from rich.table import Table

from sinkbed.plain_text import console, counted, csv_of, csv_text, markdown_table, visible
from sinkbed.progress import loading
from sinkbed.train.report.figures import drawable
from sinkbed.train.report.model_figures import _visible as visible_token


def test_a_terminal_takes_no_markup_from_a_text(capsys):
    table = Table(title="[/b] title [red]")
    table.add_column("[bold]token")
    table.add_row("[/i] :smile: [link=x]")
    console(80).print(table)
    shown = capsys.readouterr().out
    assert "[/b] title [red]" in shown and "[bold]token" in shown and "[/i] :smile: [link=x]" in shown


def test_control_characters_are_written_out():
    assert visible("a\x1b[31m\r\n\u202e⟨bos⟩ é") == "a\\x1b[31m\\r\\n\\u202e⟨bos⟩ é"


def test_a_spreadsheet_takes_no_formula_from_a_text():
    text = csv_text(["token", "value"], [["=1+1", -2.5], ["@x", None], ["+", "a,b\nc"], ["a=b", 0]])
    assert list(csv.reader(io.StringIO(text))) == [
        ["token", "value"], ["'=1+1", "-2.5"], ["'@x", ""], ["'+", "a,b\nc"], ["a=b", "0"],
    ]  # fmt: skip


def test_a_record_without_a_column_has_an_empty_cell():
    assert csv_of([{"a": 1, "b": 2}, {"b": 3}], ["a", "b"]) == "a,b\n1,2\n,3\n"


def test_markdown_takes_no_html_or_line_break_from_a_text():
    assert markdown_table(["a|b"], [["<img src=x>"], ["two\nlines"]]) == [
        "| a\\|b |", "| --- |", "| &lt;img src=x&gt; |", "| two lines |",
    ]  # fmt: skip


def test_figures_write_out_what_their_font_has_no_glyph_for(recwarn):
    """matplotlib would warn of each, and draw a box."""
    from matplotlib.figure import Figure

    assert drawable("é naïve ⟨bos⟩ 你") == "é naïve ⟨bos⟩ U+4F60" and visible_token(" 你好") == "U+4F60U+597D"
    figure = Figure()
    figure.text(0, 0, drawable("你好 ∑ $"))
    figure.savefig(io.BytesIO(), format="png")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_a_count_of_one_has_no_plural():
    assert (counted(1, "document"), counted(2000, "document"), counted(0, "point")) == (
        "1 document", "2,000 documents", "0 points",
    )  # fmt: skip


def test_what_takes_a_while_to_import_is_said_on_a_terminal_and_gone_after(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, line in ((Terminal(), "loading torch …"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", stream)
        with loading("torch"):
            assert stream.getvalue() == line
        assert stream.getvalue().endswith("\r" if line else "")
