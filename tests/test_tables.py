"""Tables on a console, as Markdown and as CSV."""

from __future__ import annotations

import io

from rich.console import Console

from mgebm_fast.tables import console_table, csv_text, markdown, note, number


def printed(what: object) -> str:
    console = Console(file=io.StringIO(), width=60)
    console.print(what)
    return console.file.getvalue()


def test_figures():
    assert number(0.12345, "{:.3f}") == "0.123" and number(None, "{:.3f}") == "–"


def test_names_are_no_markup():
    text = printed(console_table("runs", ["run", "KID"], [["[bold]x", "1.0"], ["y", "2.0", "dim"]]))
    assert "[bold]x" in text and "2.0" in text
    assert printed(note("note", "[red]")) == "note  [red]\n"


def test_figures_stand_at_the_right():
    rows = printed(console_table("t", ["name", "figure"], [["a", "1"], ["b", "100"]])).splitlines()
    assert any(line.rstrip("│ ").endswith("  1") for line in rows)


def test_markdown_escapes_what_would_end_a_cell():
    assert markdown(["a", "b"], [["1|2", "3"]]) == "| a | b |\n|---|---|\n| 1\\|2 | 3 |"


def test_csv_takes_the_named_columns():
    assert csv_text(["a", "b"], [{"a": 1, "c": 3}, {"b": 'x"y'}]) == 'a,b\n1,\n,"x""y"\n'
