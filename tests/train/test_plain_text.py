"""A text stays a text in the terminal, in CSV and in Markdown."""

import csv
import io

from rich.table import Table

from sinkbed.plain_text import console, csv_of, csv_text, markdown_table, visible


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
