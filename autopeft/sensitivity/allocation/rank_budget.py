"""RankBudget: what may be spent on ranks; and the checks of what allocators are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from autopeft.core.adapter import Site
from autopeft.core.errors import check_whole

Scores = Mapping[Site, float]
"""How much each site promises, or counts of its sensitive weights: at least 0."""
Spectra = Mapping[Site, Sequence[float]]
"""What each further rank at a site adds: numbers of at least 0, the largest first."""
Ranks = Mapping[Site, int]


@dataclass(frozen=True, kw_only=True)
class RankBudget:
    """What may be spent on ranks, and what a rank costs.

    Args:
        total: What may be spent, in the unit of `costs`.
        costs: The cost of one rank at each site: d_in + d_out for a budget in trainable parameters, 1 for
            a budget in the sum of ranks. It may name more sites than are scored; only those get ranks.
        smallest: The rank that every site gets whatever its score; 0 lets a site go without.
        largest: The rank that no site exceeds.

    Raises:
        ValueError: A number is not whole or out of range, or there are no costs.
    """

    total: int
    costs: Mapping[Site, int]
    smallest: int = 0
    largest: int = 64

    def __post_init__(self) -> None:
        check_whole("The total of a budget", self.total, least=0)
        check_whole("The smallest rank", self.smallest, least=0)
        check_whole("The largest rank", self.largest, least=max(1, self.smallest))
        if not self.costs:
            raise ValueError("A budget needs the cost of a rank at each site, got no costs.")
        for site, cost in self.costs.items():
            check_whole(f"The cost of a rank at {site}", cost, least=1)
        object.__setattr__(self, "costs", {site: self.costs[site] for site in sorted(self.costs)})


def check_number(what: str, value: float, holds: Callable[[float], bool], expected: str) -> None:
    """Raise a ValueError unless the value is a finite number for which `holds` is true, as `expected`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{what} is a finite number {expected}, got {value!r}.")


def check_costs(sites: Collection[Site], costs: Mapping[Site, int]) -> None:
    """Raise a ValueError where there is no site, or a site has no cost."""
    if not sites:
        raise ValueError("No sites to give ranks to: expected at least one.")
    for site in sorted(sites):
        if site not in costs:
            raise ValueError(f"{site} has no cost: the costs of a budget must name every site there is.")


def checked_scores(scores: Scores, budget: RankBudget) -> dict[Site, float]:
    """Return the scores in the order of the sites.

    Raises:
        ValueError: A score is negative or not finite, or the budget does not fit the sites.
    """
    _check_sites(scores, budget)
    for site, score in scores.items():
        if not math.isfinite(score) or score < 0:
            raise ValueError(f"The score of {site} is {score}: expected a finite number of at least 0.")
    return {site: float(scores[site]) for site in sorted(scores)}


def checked_spectra(spectra: Spectra, budget: RankBudget) -> dict[Site, tuple[float, ...]]:
    """Return the spectra in the order of the sites, each in descending order.

    Raises:
        ValueError: A number is negative or not finite, or the budget does not fit the sites.
    """
    _check_sites(spectra, budget)
    for site, spectrum in spectra.items():
        for value in spectrum:
            if not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"The spectrum of {site} contains {value}: expected finite numbers of at least 0."
                )
    return {site: tuple(sorted(map(float, spectra[site]), reverse=True)) for site in sorted(spectra)}


def _check_sites(sites: Collection[Site], budget: RankBudget) -> None:
    check_costs(sites, budget.costs)
    floor = budget.smallest * sum(budget.costs[site] for site in sites)
    if budget.total < floor:
        raise ValueError(
            f"A budget of {budget.total} does not pay for rank {budget.smallest} at all {len(sites)} sites, "
            f"which costs {floor}: raise the total or lower the smallest rank."
        )
