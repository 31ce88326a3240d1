"""Tables and figures as text at a prompt, as HTML in a notebook, and as pages of their own."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from autopeft.core.configuration import Configuration

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TEXT_WIDTH = 140


def methods_label(configuration: Configuration, values: Mapping[str, float] | None = None) -> str:
    """Return the methods of a configuration, as in "lora+prefix"; its values tell of a trained head."""
    alone = "head alone" if (values or {}).get("trainable_parameters") else "no adapter"
    return "+".join(configuration.methods) or alone


def titled_table(title: str, headings: Iterable[str], *, words: Collection[str]) -> Table:
    """Return a table without rows; columns of words are aligned to the left, others to the right."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", overflow="fold")
    return table


def as_text(table: Table) -> str:
    """Return a table as plain text."""
    console = Console(width=TEXT_WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def html_page(figure: Figure, *, title: str) -> str:
    """Return a plotly figure as a page (about 5 MB) that it fills in width, with nothing from the network."""
    chart = figure.to_html(include_plotlyjs=True, full_html=False, config={"responsive": True})
    head = f'<head><meta charset="utf-8"/><title>{html.escape(title)}</title></head>'
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{chart}\n</body>\n</html>\n'


class Tabular:
    """What is shown as a table."""

    def table(self) -> Table:
        """Return a rich table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return as_text(self.table())

    def _repr_html_(self) -> str:
        table = self.table()
        heading = _html_row((column.header for column in table.columns), "th")
        rows = zip(*(column.cells for column in table.columns), strict=True)
        body = "".join(_html_row(row, "td") for row in rows)
        title = html.escape(str(table.title))
        caption = html.escape(str(table.caption or ""))
        shown = f"<table><thead>{heading}</thead><tbody>{body}</tbody></table>"
        return f"<p>{title}</p>{shown}<p>{caption}</p>"


def _html_row(cells: Iterable[object], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
