"""From scores to adapters: the best sites of a backbone share a budget of trainable parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autopeft.core.adapter import Adapter, Site
from autopeft.core.method_specs import method_spec
from autopeft.methods import count_site, obstacle
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.sensitivity import SiteScores
from autopeft.sensitivity.allocation import ALLOCATORS, RankBudget

_FFN = "ffn"
_LOWEST, _HIGHEST = method_spec("lora").sizes
_LORA = MethodChoice(method="lora", sizes=range(_LOWEST, _HIGHEST + 1))
SCORES_WITH_SPECTRA = ("gradient_spectrum", "explained_variance")
"""Scores that say what each rank of an adapter adds, which some allocators read."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How a score becomes the sizes of a method's adapters."""

    budget: int  # trainable parameters of all adapters together (the head not counted)
    # A method with sizes, of which the largest bounds an adapter's, and its options.
    choice: MethodChoice = _LORA
    allocator: str = "proportional"  # one of `ALLOCATORS`
    placement: float = 1.0  # share of the sites that may carry an adapter, the best first, in (0, 1]
    # Blocks below it carry none, which is what saves memory. It counts in the longest stack; shorter ones
    # have the same share of their blocks below.
    lowest_block: int = 0
    stacks: Sequence[str] | None = None  # stacks that may carry an adapter; None for all
    # Roles that may carry an adapter; None for all that the method can sit on.
    roles: Sequence[str] | None = None
    # Options of the allocator, as `{"temperature": 0.5}`.
    allocator_options: Mapping[str, float] = field(default_factory=dict)

    def adapters(self, backbone: Backbone, scores: SiteScores) -> dict[Site, Adapter]:
        """Return the adapters that the score's best sites get; a site may get none.

        The budget is kept by the sizes alone: series and parallel adapters have one bias more a site.
        """
        rule = ALLOCATORS[self.allocator]
        method, options = self.choice.method, self.choice.options
        longest = max(map(len, backbone.stacks.values()))
        sites = [
            site
            for site in self.candidates(backbone)
            if site.block >= self.lowest_block * len(backbone.stacks[site.stack]) // longest
        ]
        if not sites:
            raise ValueError(
                f"{method!r} can sit on no site of {backbone.name} in the blocks from "
                f"{self.lowest_block} up" + (f" in the roles {', '.join(self.roles)}." if self.roles else ".")
            )
        values = site_values(scores, sites)
        ranking = sorted(sites, key=lambda site: (-values[site], site))
        chosen = ranking[: max(1, math.ceil(self.placement * len(ranking)))]
        unit, double = (Adapter(method, size, options) for size in (1, 2))
        costs = {
            site: count_site(backbone, site, double) - count_site(backbone, site, unit) for site in chosen
        }
        evidence: Mapping[Site, object] = scores.spectra if rule.evidence == "spectra" else values
        sizes = rule(
            {site: evidence.get(site, ()) for site in chosen},
            RankBudget(total=self.budget, costs=costs, largest=self.choice.largest.size or 1),
            **self.allocator_options,
        )
        return {site: Adapter(method, sizes[site], options) for site in chosen if sizes[site]}

    def candidates(self, backbone: Backbone) -> list[Site]:
        """Return the sites that the method can sit on, in the chosen roles and stacks."""
        return [
            site
            for site in backbone.sites
            if (self.roles is None or site.role in self.roles)
            and (self.stacks is None or site.stack in self.stacks)
            and not obstacle(backbone, site, self.choice.smallest)
        ]


def site_values(scores: SiteScores, sites: Iterable[Site]) -> dict[Site, float]:
    """Return a score of at least 0 for every site, also for those that are no single matrix.

    A sublayer has the sum of its matrices' scores (a gradient's share of the sublayer), anything else, as a
    norm, the mean of its block's. Numbers below 0, which some scores give, count as 0.
    """
    values = {site: max(0.0, value) for site, value in scores.values.items()}
    return {site: values[site] if site in values else _value_of_block(values, site) for site in sites}


def _value_of_block(values: Mapping[Site, float], site: Site) -> float:
    block = {scored: value for scored, value in values.items() if scored.place == site.place}
    if site.kind not in ("attention", "ffn"):
        return sum(block.values()) / max(1, len(block))
    is_ffn = site.role == _FFN
    return sum(value for scored, value in block.items() if scored.role.startswith(_FFN) == is_ffn)
