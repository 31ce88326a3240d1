"""RankBudget: what may be spent on ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.core.adapter import Site
from autopeft.core.errors import check_whole

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
