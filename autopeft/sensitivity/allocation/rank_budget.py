"""RankBudget, and the one procedure that spends it: ranks are granted one by one, as a rule wants them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from autopeft.core.adapter import Site
from autopeft.core.errors import check_whole

Ranks = Mapping[Site, int]
Priority = tuple[float, ...]
"""How much a site wants its next rank: larger entries first, compared entry by entry."""

# Of a rank: shares that differ by less are one share, so that rounding errors decide nothing.
DECIMALS = 6
# Relative to the largest weight: a site below it has no share, and the inverse of its weight may overflow.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, kw_only=True)
class RankBudget:
    """What may be spent on ranks, and what a rank costs.

    Args:
        total: What may be spent, in the unit of `costs`.
        costs: The cost of one rank at each site: d_in + d_out for a budget in trainable parameters, 1 for
            a budget in the sum of ranks. It may name more sites than are scored; only those get ranks.
        smallest: The rank that every site gets whatever its score; 0 lets a site go without.
        largest: The rank that no site exceeds.
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


def greedy_allocate(
    sites: Collection[Site],
    budget: RankBudget,
    priority: Callable[[Site, int], Priority],
    largest: int | None = None,
) -> Ranks:
    """Start at the smallest rank everywhere and grant ranks one by one until no site can take another.

    `priority` says how much a site wants its next rank, given the rank it has. It must not grow with the
    rank, or the order is not the order of the priorities. The order of the sites breaks ties.
    """
    largest = budget.largest if largest is None else largest
    ranks = dict.fromkeys(sites, budget.smallest)
    left = budget.total - sum(budget.smallest * budget.costs[site] for site in sites)

    def entry(order: int, site: Site) -> tuple[Priority, int, Site]:
        return tuple(-part for part in priority(site, ranks[site])), order, site

    queue = [entry(order, site) for order, site in enumerate(sites) if ranks[site] < largest]
    heapq.heapify(queue)
    while queue:
        _, order, site = heapq.heappop(queue)
        if budget.costs[site] > left:
            continue  # What is left only shrinks: this site has its last rank.
        left -= budget.costs[site]
        ranks[site] += 1
        if ranks[site] < largest:
            heapq.heappush(queue, entry(order, site))
    return ranks


def by_largest_remainder(
    shares: Mapping[Site, float], weights: Mapping[Site, float], budget: RankBudget
) -> Ranks:
    """Round shares to ranks: the site that is furthest below its share gets the next rank.

    For shares that add up to the budget and lie within the bounds, this is the method of the largest
    remainder (Hamilton's). Otherwise what the bounds leave or take is spread evenly over the other sites.
    Sites of weight 0 come last.
    """
    return greedy_allocate(
        shares, budget, lambda site, rank: (weights[site] > 0, round(shares[site] - rank, DECIMALS))
    )


def bounded_shares(weights: Mapping[Site, float], budget: RankBudget) -> dict[Site, float]:
    """Return clip(λ·weight, smallest, largest) a site, with λ such that the shares cost the budget.

    Weights are numbers from 0 to 1, at least one of them 1.
    """
    relative = np.array(list(weights.values()))
    relative[relative < _NEGLIGIBLE] = 0.0
    costs = np.array([budget.costs[site] for site in weights], dtype=float)
    # What the shares cost is linear in λ between the levels at which one of them meets a bound.
    positive = relative[relative > 0]
    levels = np.unique(np.concatenate((budget.smallest / positive, budget.largest / positive)))
    bounded = np.clip(np.outer(levels, relative), budget.smallest, budget.largest)
    level = np.interp(budget.total, bounded @ costs, levels)
    shares = np.clip(level * relative, budget.smallest, budget.largest)
    return dict(zip(weights, shares.tolist(), strict=True))
