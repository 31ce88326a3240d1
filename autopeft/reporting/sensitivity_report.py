"""What the scores say of a backbone on a task: a table, a heat map, and the plain numbers."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as StaticFigure
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table

from autopeft.core.adapter import Site
from autopeft.core.method_specs import ROLES
from autopeft.reporting.html_page import save_html_page
from autopeft.sensitivity import SiteScores

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 3
_HEADING = "Sensitivity scores before training, each relative to its largest"


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
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
        values = self.scores[name].values
        blocks = sorted({site.block for site in values})
        roles = [role for role in ROLES if any(site.role == role for site in values)]
        largest = max(map(abs, values.values())) or 1.0
        cells = [[values.get(Site(block, role), math.nan) / largest for role in roles] for block in blocks]
        return blocks, roles, np.array(cells)

    def table(self) -> Table:
        """Return a rich table: the sites by block and role, each score relative to its largest."""
        table = Table(title=_HEADING, title_justify="left")
        for heading in ("block", "role"):
            table.add_column(heading)
        for name in self.scores:
            table.add_column(name, justify="right", overflow="fold")
        largest = {name: max(map(abs, scores.values.values())) or 1.0 for name, scores in self.scores.items()}
        for site in self.sites:
            cells = (
                f"{scores.values[site] / largest[name]:.2f}" if site in scores.values else ""
                for name, scores in self.scores.items()
            )
            table.add_row(str(site.block), site.role, *cells)
        return table

    def plot(self) -> Figure:
        """Return a plotly figure: a heat map of block and role for every score."""
        names = list(self.scores)
        rows = math.ceil(len(names) / _COLUMNS)
        figure = make_subplots(rows=rows, cols=min(_COLUMNS, len(names)), subplot_titles=names)
        for index, name in enumerate(names):
            blocks, roles, cells = self.grid(name)
            figure.add_trace(
                go.Heatmap(
                    z=cells,
                    x=roles,
                    y=[f"block {block}" for block in blocks],
                    zmin=min(0.0, float(np.nanmin(cells))),
                    zmax=1.0,
                    colorscale="Viridis",
                    showscale=index == 0,
                    hovertemplate="%{y}, %{x}: %{z:.3f}<extra>" + html.escape(name) + "</extra>",
                ),
                row=index // _COLUMNS + 1,
                col=index % _COLUMNS + 1,
            )
        figure.update_layout(title=_HEADING, height=120 + 330 * rows, width=1200, template="plotly_white")
        return figure

    def image(self) -> bytes:
        """Return the heat maps as PNG."""
        names = list(self.scores)
        rows = math.ceil(len(names) / _COLUMNS)
        figure = StaticFigure(figsize=(13, 0.6 + 3.4 * rows), layout="constrained")
        figure.suptitle(_HEADING)
        grid = figure.subplots(rows, min(_COLUMNS, len(names)), squeeze=False)
        for place in grid.flat[len(names) :]:
            place.set_axis_off()
        for place, name in zip(grid.flat, names, strict=False):
            blocks, roles, cells = self.grid(name)
            place.imshow(
                cells, vmin=min(0.0, float(np.nanmin(cells))), vmax=1.0, cmap="viridis", aspect="auto"
            )
            place.set_title(name)
            place.set_xticks(range(len(roles)), roles, rotation=30, ha="right", fontsize=8)
            place.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
            place.invert_yaxis()
            place.set_ylabel("block")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()

    def save(self, folder: Path) -> tuple[Path, ...]:
        """Write heat maps (HTML, self-contained, and PNG), the table and the scores into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("heatmap.html", "heatmap.png", "scores.csv", "scores.json")]
        save_html_page(self.plot(), paths[0], title="Sensitivity scores")
        paths[1].write_bytes(self.image())
        self.to_frame().to_csv(paths[2], index=False)
        plain = [scores.to_dict() for scores in self.scores.values()]
        paths[3].write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        return tuple(paths)

    def __repr__(self) -> str:
        console = Console(width=40 + 20 * len(self.scores), color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        table: str = self.to_frame().to_html(index=False)
        return f"<p>{_HEADING}</p>{table}"
