"""Tables, as text at a prompt and as HTML in a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.table import Table

TEXT_WIDTH = 140


def titled_table(title: str, headings: Iterable[str], *, words: Collection[str]) -> Table:
    """Return a table without rows; columns of words are aligned to the left, others to the right."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", overflow="fold")
    return table


def as_text(table: Table) -> str:
    """Return a table as plain text."""
    console = Console(width=TEXT_WIDTH, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is, on a single line, also in a table."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(text.split()))


def markdown_block(text: str) -> str:
    """Return lines that Markdown shows as they are, in a fence that no line of theirs ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def html_table(table: Table) -> str:
    """Return the headings and rows of a table as HTML, which shows every cell as it is."""
    heading = _html_row((column.header for column in table.columns), "th")
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(_html_row(row, "td") for row in rows)
    return f"<table><thead>{heading}</thead><tbody>{body}</tbody></table>"


class Tabular:
    """What is shown as a table."""

    def table(self) -> Table:
        """Return a rich table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(self.table())

    def _repr_html_(self) -> str:
        table = self.table()
        title, caption = html.escape(str(table.title)), html.escape(str(table.caption or ""))
        return f"<p>{title}</p>{html_table(table)}<p>{caption}</p>"


def _html_row(cells: Iterable[object], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
