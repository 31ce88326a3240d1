"""Ways to decide about ranks while a configuration is trained, and what each of them acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopeft.core.adapter import Adapter, Site


@dataclass(frozen=True, kw_only=True)
class RankAllocation:
    """A way to decide about ranks in training; `autopeft.training.rank_allocation` has its callback."""

    method: str = "lora"  # the method whose ranks it decides about
    kept: float = 1.0  # share of the ranks that it ends with; 1 where the data decide, or all stay
    draws_blocks: bool = False  # whether it draws which blocks are trained, so that each must have such ranks


RANK_ALLOCATIONS: Mapping[str, RankAllocation] = {
    "adalora": RankAllocation(method="adalora", kept=0.5),
    "increlora": RankAllocation(kept=0.5),
    "elalora": RankAllocation(kept=0.5),
    "sora": RankAllocation(),
    "ard_lora": RankAllocation(),
    "ist": RankAllocation(draws_blocks=True),
}
"""Every way that a configuration may name."""


def allocation_obstacle(name: str, adapters: Mapping[Site, tuple[Adapter, ...]]) -> str | None:
    """Say why a way to allocate ranks cannot be used with the adapters of a configuration; None if it can."""
    allocation = RANK_ALLOCATIONS[name]
    layers = {site: several for site, several in adapters.items() if site.kind in ("linear", "experts")}
    ranks = [
        adapter.size_or_zero
        for site, several in layers.items()
        for adapter in several
        if adapter.method == allocation.method and site.kind == "linear"
    ]
    if not ranks or len(ranks) < sum(map(len, layers.values())):
        return f"every adapted layer carries {allocation.method} and nothing else"
    if allocation.kept * sum(ranks) < len(ranks):
        return f"the mean rank is {1 / allocation.kept:g} or more"
    blocks = {site.place for site in layers}
    if allocation.draws_blocks and (len(blocks) < 2 or blocks != {site.place for site in adapters}):
        return f"two blocks or more carry adapters, and each of them {allocation.method}"
    return None
