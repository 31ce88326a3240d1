"""From scores to adapters: the best sites of a backbone share a budget of trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autopeft.core.adapter import Adapter, Site
from autopeft.core.method_specs import KIND_OF_ROLE, OptionValue
from autopeft.methods import count_site
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import SiteScores
from autopeft.sensitivity.allocation import ALLOCATORS, RankBudget, find_allocator

_FFN = "ffn"
SCORE_ALLOCATORS = tuple(name for name, rule in ALLOCATORS.items() if rule.evidence != "counts")
"""Allocators that read the scores of sites; the others read counts of sensitive weights."""
SCORES_WITH_SPECTRA = ("gradient_spectrum", "explained_variance")
"""Scores that say what each rank of an adapter adds, which some allocators read."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How a score becomes the sizes of a method's adapters.

    Attributes:
        budget: Trainable parameters of all adapters together (the head not counted).
        method: A method with a size: "lora", "series", "parallel" or "prefix".
        allocator: One of `SCORE_ALLOCATORS`.
        placement: Share of the sites that may carry an adapter, the best first, in (0, 1].
        lowest_block: Blocks below it carry none, which is what saves memory.
        largest: Largest size of an adapter.
        roles: Roles that may carry an adapter; None for all that the method can sit on.
        allocator_options: Options of the allocator, as `{"temperature": 0.5}`.
        options: Options of the adapters, as `{"alpha": 16}`.
    """

    budget: int
    method: str = "lora"
    allocator: str = "proportional"
    placement: float = 1.0
    lowest_block: int = 0
    largest: int = 64
    roles: Sequence[str] | None = None
    allocator_options: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, OptionValue] = field(default_factory=dict)

    def adapters(self, backbone: Backbone, scores: SiteScores) -> dict[Site, Adapter]:
        """Return the adapters that the score's best sites get; a site may get none.

        The budget is kept by the sizes alone: series and parallel adapters have one bias more a site.

        Raises:
            ValueError: The method has no size or no site, the allocator reads what the score does not
                have, or a number is out of range.
        """
        rule = find_allocator(self.allocator)
        unit = Adapter(self.method, 1, self.options)
        sites = [site for site in self.candidates(backbone) if site.block >= self.lowest_block]
        if not sites:
            raise ValueError(
                f"{self.method!r} can sit on no site of {backbone.name} in the blocks from "
                f"{self.lowest_block} up" + (f" in the roles {', '.join(self.roles)}." if self.roles else ".")
            )
        values = site_values(scores, sites)
        ranking = sorted(sites, key=lambda site: (-values[site], site))
        chosen = ranking[: max(1, math.ceil(self.placement * len(ranking)))]
        budget = RankBudget(
            total=self.budget,
            costs={site: _unit_cost(backbone, site, unit) for site in chosen},
            largest=self.largest,
        )
        if rule.evidence == "spectra":
            evidence: Mapping[Site, object] = {site: scores.spectra.get(site, ()) for site in chosen}
        else:
            evidence = {site: values[site] for site in chosen}
        sizes = rule(evidence, budget, **self.allocator_options)
        return {site: Adapter(self.method, sizes[site], self.options) for site in chosen if sizes[site]}

    def candidates(self, backbone: Backbone) -> list[Site]:
        """Return the sites that the method can sit on, in the chosen roles."""
        return [
            site
            for site, shape in backbone.sites.items()
            if (self.roles is None or site.role in self.roles) and not backbone.obstacle(shape, self.method)
        ]


def _unit_cost(backbone: Backbone, site: Site, unit: Adapter) -> int:
    """Return what one more unit of size costs at a site, in parameters."""
    double = Adapter(unit.method, 2, dict(unit.options))
    return count_site(backbone, site, double) - count_site(backbone, site, unit)


def site_values(scores: SiteScores, sites: Iterable[Site]) -> dict[Site, float]:
    """Return a score of at least 0 for every site, also for those that are no single matrix.

    A sublayer has the sum of its matrices' scores (a gradient's share of the sublayer), a norm the mean
    of its block's. Numbers below 0, which some scores give, count as 0.
    """
    values = {site: max(0.0, value) for site, value in scores.values.items()}
    return {site: values[site] if site in values else _value_of_block(values, site) for site in sites}


def _value_of_block(values: Mapping[Site, float], site: Site) -> float:
    block = {scored: value for scored, value in values.items() if scored.block == site.block}
    if KIND_OF_ROLE[site.role] == "norm":
        return sum(block.values()) / max(1, len(block))
    is_ffn = site.role == _FFN
    return sum(value for scored, value in block.items() if scored.role.startswith(_FFN) == is_ffn)
