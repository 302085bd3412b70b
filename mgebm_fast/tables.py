"""Tables: for a rich console, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def number(value: float | None, form: str) -> str:
    """A figure by a format such as "{:.3f}"; a dash for None."""
    return "–" if value is None else form.format(value)


def console_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    styles: Sequence[str] = (),
    left: Collection[int] = (0,),
    no_wrap: Collection[int] = (),
    **look: Any,
) -> Table:
    """A table for a rich console; strings are shown as they are, without markup.

    Args:
        rows: one cell for each heading, and a style of the row after them where it has one.
        styles: of the first columns.
        left, no_wrap: indices of the columns that are aligned left (others right), and that are never wrapped.
        look: further arguments of rich's Table.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", **look)
    for index, heading in enumerate(headings):
        style = styles[index] if index < len(styles) else ""
        table.add_column(
            heading, style=style, justify="left" if index in left else "right", no_wrap=index in no_wrap,
            overflow="fold",  # a narrow terminal breaks words and leaves nothing out
        )  # fmt: skip
    count = len(headings)
    for row in rows:
        cells = (Text(cell) if isinstance(cell, str) else cell for cell in row[:count])
        table.add_row(*cells, style=row[count] if len(row) > count else "")
    return table


def note(name: str, words: str) -> Text:
    """A line below a table: its name in bold, and the words."""
    from rich.text import Text

    return Text.assemble((name, "bold"), "  ", (words, "dim"))


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(headings), *lines[1:]])


def csv_text(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A CSV file: a line of names, then what each row has under them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
