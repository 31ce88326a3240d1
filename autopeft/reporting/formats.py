"""Methods as text, and figures as pages of their own."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

from autopeft.core.configuration import Configuration

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def methods_label(configuration: Configuration, values: Mapping[str, float] | None = None) -> str:
    """Return the methods of a configuration, as in "lora+prefix"; its values tell of a trained head."""
    alone = "head alone" if (values or {}).get("trainable_parameters") else "no adapter"
    how = "" if configuration.allocation is None else f" by {configuration.allocation}"
    return ("+".join(configuration.methods) or alone) + how


def html_page(figure: Figure, *, title: str) -> str:
    """Return a plotly figure as a page (about 5 MB) that it fills in width, with nothing from the network."""
    chart = figure.to_html(include_plotlyjs=True, full_html=False, config={"responsive": True})
    head = f'<head><meta charset="utf-8"/><title>{html.escape(title)}</title></head>'
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{chart}\n</body>\n</html>\n'
