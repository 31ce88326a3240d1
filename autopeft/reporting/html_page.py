"""A plotly figure as one HTML page that needs nothing from the network."""

from __future__ import annotations

import html

from plotly import graph_objects as go


def html_page(figure: go.Figure, *, title: str) -> str:
    """Return a figure as a page of its own (about 5 MB), which it fills in width.

    Args:
        figure: The figure.
        title: The page's title.
    """
    chart = figure.to_html(include_plotlyjs=True, full_html=False, config={"responsive": True})
    head = f'<head><meta charset="utf-8"/><title>{html.escape(title)}</title></head>'
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{chart}\n</body>\n</html>\n'
