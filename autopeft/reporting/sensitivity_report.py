"""What the scores say of a backbone on a task: a table, a heat map, and the plain numbers."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from autopeft.core.adapter import Site, place_name, role_order
from autopeft.core.tables import Tabular, titled_table
from autopeft.reporting.formats import html_page
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
        """Return a row a site: block, role, and a column a score, in the scores' own units.

        A block is called by its number, or as in "decoder.3" where there are several stacks.
        """
        places = [site.place for site in self.sites]
        blocks: list[object] = [place_name(place) if place[0] else place[1] for place in places]
        frame = pd.DataFrame({"block": blocks, "role": [site.role for site in self.sites]})
        for name, scores in self.scores.items():
            frame[name] = [scores.values.get(site, math.nan) for site in self.sites]
        return frame

    def _relative(self) -> pd.DataFrame:
        """Return `to_frame` with each score relative to its largest."""
        frame, names = self.to_frame(), list(self.scores)
        frame[names] /= frame[names].abs().max().replace(0.0, 1.0)
        return frame

    def table(self) -> Table:
        """Return a rich table: the sites by block and role, each score relative to its largest."""
        table = titled_table(_HEADING, ("block", "role", *self.scores), words=["role"])
        for block, role, *values in self._relative().itertuples(index=False):
            table.add_row(
                str(block), role, *("" if math.isnan(value) else f"{value:.2f}" for value in values)
            )
        return table

    def plot(self) -> go.Figure:
        """Return a plotly figure: a heat map of block and role for every score."""
        names, relative = list(self.scores), self._relative()
        rows = math.ceil(len(names) / _COLUMNS)
        titles = [html.escape(name) for name in names]
        figure = make_subplots(rows=rows, cols=min(_COLUMNS, len(names)), subplot_titles=titles)
        for index, name in enumerate(names):
            cells = relative.dropna(subset=name).pivot(index="block", columns="role", values=name)
            cells = cells.reindex(
                index=[block for block in relative["block"].unique() if block in cells.index],
                columns=sorted(cells, key=lambda role: (role_order(role), role)),
            )
            figure.add_heatmap(
                z=cells,
                x=list(cells.columns),
                y=[f"block {block}" for block in cells.index],
                zmin=min(0.0, relative[name].min()),
                zmax=1.0,
                colorscale="Viridis",
                showscale=index == 0,
                hovertemplate="%{y}, %{x}: %{z:.3f}<extra>" + html.escape(name) + "</extra>",
                row=index // _COLUMNS + 1,
                col=index % _COLUMNS + 1,
            )
        figure.update_layout(title=_HEADING, height=120 + 330 * rows, width=1200, template="plotly_white")
        return figure

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write heat maps (HTML, self-contained), the table and the scores into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page, table, plain = (folder / name for name in ("heatmap.html", "scores.csv", "scores.json"))
        page.write_text(html_page(self.plot(), title="Sensitivity scores"), encoding="utf-8")
        self.to_frame().to_csv(table, index=False)
        scores = [scores.to_dict() for scores in self.scores.values()]
        plain.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        return page, table, plain
