"""The layer card of a backbone: what an adapter costs at each site, and what the sites have given so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from rich.table import Table

from autopeft.core.configuration import Configuration, Site
from autopeft.core.objectives import COST_OBJECTIVES
from autopeft.core.tables import Tabular, titled_table
from autopeft.methods import count_site
from autopeft.models.backbone import Backbone
from autopeft.reporting.configuration_image import site_svg
from autopeft.reporting.front import ParetoFront
from autopeft.search_spaces import SearchSpace
from autopeft.search_spaces.prior import Prior, site_credits

_MEMORY = COST_OBJECTIVES["peak_memory"]
_COLOUR = (86, 180, 233)  # red, green and blue of the most credit
_PALEST = 0.2  # its share where there is none: what was tried differs from what was not


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LayerCard(Tabular):
    """What adapters cost at the sites of a backbone, and what they have given.

    Attributes:
        backbone: Its name.
        trials: Number of trials that it is made from.
        frame: A row a site that the space offers: the `site`; the features that are its `inputs` and
            `outputs`; in a column a method the parameters of its smallest adapter there; on request the
            `peak_memory` in bytes of training the smallest of these adapters alone; the number of `trials`
            with an adapter there, and of those on the `front`; the `credit`, what the site has added to the
            hypervolume as a share of what all have (each point of the front shares evenly among its sites);
            and the `weight` that earlier searches give it. NaN where nothing is known.
    """

    backbone: str
    trials: int
    frame: pd.DataFrame

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        space: SearchSpace,
        prior: Prior,
        front: ParetoFront,
        costs: Callable[[Configuration], Mapping[str, float]] | None = None,
    ) -> LayerCard:
        """Make the card of a search; with `costs`, which counts a configuration's, it has the peak memory."""
        choices = space.choices(backbone)
        trained = [
            record.evaluation
            for record in front.records
            if record.evaluation.status in ("complete", "paused") and record.duplicate_of is None
        ]
        points = [(point.configuration, share) for point, share in zip(front, front.shares(), strict=True)]
        credits = site_credits(points)
        tried = Counter(site for evaluation in trained for site in evaluation.configuration.adapters)
        on_front = Counter(site for configuration, _ in points for site in configuration.adapters)
        peaks: dict[Site, float] = {}
        if costs is not None:
            for site, methods in choices.items():
                adapters = [choice.smallest for choice in methods.values()]
                smallest = min(adapters, key=partial(count_site, backbone, site))
                peaks[site] = costs(space.point({site: smallest})).get(_MEMORY.name, math.nan)
        rows = [
            {
                "site": str(site),
                "inputs": backbone.sites[site].in_features,
                "outputs": backbone.sites[site].out_features,
                **{name: count_site(backbone, site, each.smallest) for name, each in methods.items()},
                **({_MEMORY.name: peaks[site]} if peaks else {}),
                "trials": tried[site],
                "front": on_front[site],
                "credit": credits.get(site, 0.0),
                "weight": prior.weights.get(site, math.nan),
            }
            for site, methods in choices.items()
        ]
        return cls(backbone=backbone.name, trials=len(trained), frame=pd.DataFrame(rows))

    def to_frame(self) -> pd.DataFrame:
        """Return a row a site; see `frame`."""
        return self.frame.copy()

    @property
    def _title(self) -> str:
        return f"What the sites of {self.backbone} cost, and gave in {self.trials} trials"

    def table(self) -> Table:
        """Return a rich table."""
        table = titled_table(self._title, map(str, self.frame), words=["site"])
        shown = self.frame.astype(object)
        if _MEMORY.name in self.frame:
            shown[_MEMORY.name] = self.frame[_MEMORY.name].map(_MEMORY.format)
        shown["credit"] = self.frame["credit"].map("{:.1%}".format)
        shown["weight"] = self.frame["weight"].map("{:.2f}".format)
        for row in shown.where(self.frame.notna(), "").itertuples(index=False):
            table.add_row(*(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in row))
        return table

    def picture(self) -> str:
        """Return an SVG: each site's credit, the deeper the more; white where no trial had an adapter."""
        most = self.frame["credit"].max() or 1.0
        cells = {}
        for row in self.frame.to_dict("records"):
            site, credit, label = Site.parse(row["site"]), row["credit"], ""
            depth = 0.0
            if row["trials"]:
                depth, label = _PALEST + (1 - _PALEST) * credit / most, f"{credit:.1%}"
            shade = (f"{round(255 - depth * (255 - full)):02X}" for full in _COLOUR)
            cells[site.place, site.role] = label, f"#{''.join(shade)}"
        return site_svg(self._title, cells)

    def save(self, folder: str | Path) -> tuple[Path, ...]:
        """Write the card as JSON and its picture (SVG) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain, picture = folder / "layers.json", folder / "layers.svg"
        plain.write_text(self.frame.to_json(orient="records", indent=1) + "\n", encoding="utf-8")
        picture.write_text(self.picture(), encoding="utf-8")
        return plain, picture
