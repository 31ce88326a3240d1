"""What the scores say of a backbone on a task: a table, a heat map, and the plain numbers."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from autopeft.core.adapter import Site
from autopeft.core.method_specs import ROLES
from autopeft.reporting.html_page import html_page
from autopeft.reporting.tables import Tabular
from autopeft.sensitivity import SiteScores

_COLUMNS = 3
_HEADING = "Sensitivity scores before training, each relative to its largest"


@dataclass(frozen=True, kw_only=True, repr=False)
class SensitivityReport(Tabular):
    """Scores of every site of a backbone on a task.

    Attributes:
        scores: The scores by name.
        batches: Training batches they were computed on.
    """

    scores: Mapping[str, SiteScores]
    batches: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that has a score."""
        return tuple(sorted({site for scores in self.scores.values() for site in scores.values}))

    def to_frame(self) -> pd.DataFrame:
        """Return a row a site: block, role, and a column a score, in the scores' own units."""
        return pd.DataFrame(
            [
                {
                    "block": site.block,
                    "role": site.role,
                    **{name: scores.values.get(site, math.nan) for name, scores in self.scores.items()},
                }
                for site in self.sites
            ]
        )

    def grid(self, name: str) -> tuple[list[int], list[str], NDArray[np.float64]]:
        """Return blocks, roles, and a score relative to its largest as (blocks, roles); NaN where none."""
        values = self._relative(name)
        blocks = sorted({site.block for site in values})
        roles = [role for role in ROLES if any(site.role == role for site in values)]
        cells = [[values.get(Site(block, role), math.nan) for role in roles] for block in blocks]
        return blocks, roles, np.array(cells)

    def _relative(self, name: str) -> dict[Site, float]:
        values = self.scores[name].values
        largest = max(map(abs, values.values())) or 1.0
        return {site: value / largest for site, value in values.items()}

    def table(self) -> Table:
        """Return a rich table: the sites by block and role, each score relative to its largest."""
        table = Table(title=_HEADING, title_justify="left")
        for heading in ("block", "role"):
            table.add_column(heading)
        for name in self.scores:
            table.add_column(name, justify="right", overflow="fold")
        columns = [self._relative(name) for name in self.scores]
        for site in self.sites:
            cells = (f"{values[site]:.2f}" if site in values else "" for values in columns)
            table.add_row(str(site.block), site.role, *cells)
        return table

    def plot(self) -> go.Figure:
        """Return a plotly figure: a heat map of block and role for every score."""
        names = list(self.scores)
        rows = math.ceil(len(names) / _COLUMNS)
        figure = make_subplots(rows=rows, cols=min(_COLUMNS, len(names)), subplot_titles=names)
        for index, name in enumerate(names):
            blocks, roles, cells = self.grid(name)
            figure.add_heatmap(
                z=cells,
                x=roles,
                y=[f"block {block}" for block in blocks],
                zmin=min(0.0, float(np.nanmin(cells))),
                zmax=1.0,
                colorscale="Viridis",
                showscale=index == 0,
                hovertemplate="%{y}, %{x}: %{z:.3f}<extra>" + html.escape(name) + "</extra>",
                row=index // _COLUMNS + 1,
                col=index % _COLUMNS + 1,
            )
        figure.update_layout(title=_HEADING, height=120 + 330 * rows, width=1200, template="plotly_white")
        return figure

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write heat maps (HTML, self-contained), the table and the scores into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        page, table, plain = (folder / name for name in ("heatmap.html", "scores.csv", "scores.json"))
        page.write_text(html_page(self.plot(), title="Sensitivity scores"), encoding="utf-8")
        self.to_frame().to_csv(table, index=False)
        scores = [scores.to_dict() for scores in self.scores.values()]
        plain.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        return page, table, plain
