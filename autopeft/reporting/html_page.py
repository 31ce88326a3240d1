"""A plotly figure as one HTML file that needs nothing from the network."""

from __future__ import annotations

import html
import shutil
from importlib.resources import files
from pathlib import Path

from plotly import graph_objects as go


def save_html_page(figure: go.Figure, path: Path, *, title: str) -> None:
    """Write a figure as a page of its own (about 5 MB).

    plotly.js is copied from file to file: as text it takes 10 MB, of which plotly's own way holds several
    copies, and a search that writes its front every minute would not give them back.

    Args:
        figure: The figure; it fills the page's width.
        path: The file.
        title: The page's title.
    """
    chart = figure.to_html(include_plotlyjs=False, full_html=False, config={"responsive": True})
    head = (
        f'<html lang="en">\n<head><meta charset="utf-8"/><title>{html.escape(title)}</title></head>\n<body>'
    )
    with path.open("wb") as page:
        page.write(f"<!DOCTYPE html>\n{head}\n<script>".encode())
        with files("plotly").joinpath("package_data", "plotly.min.js").open("rb") as library:
            shutil.copyfileobj(library, page)
        page.write(f"</script>\n{chart}\n</body>\n</html>\n".encode())
