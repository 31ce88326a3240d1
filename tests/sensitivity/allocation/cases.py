"""What the tests of allocators share: few sites, and budgets and evidence of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from autopeft.core.adapter import Site
from autopeft.sensitivity.allocation import RankBudget, Ranks

# A machine that is busy with something else fails no test.

SITES = tuple(Site(block, role) for block in range(4) for role in ("query", "value", "ffn_down"))

# Few different values, so that ties are common; far apart ones, so that bounds bind.
coarse_values = st.integers(0, 4).map(float)
_fine = st.floats(0, 1e12)
some_scores = st.lists(coarse_values | _fine, min_size=1, max_size=len(SITES))
some_spectra = st.lists(st.lists(coarse_values | _fine, max_size=6), min_size=1, max_size=len(SITES))
_costs = st.sampled_from((1, 3, 96, 384, 1536, 3840))


def sited(values: Sequence[Any]) -> dict[Site, Any]:
    return dict(zip(SITES, values, strict=False))


def ranks_of(ranks: Ranks) -> list[int]:
    return [ranks[site] for site in sorted(ranks)]


def equal_costs(total: int, sites: int, **bounds: int) -> RankBudget:
    return RankBudget(total=total, costs=dict.fromkeys(SITES[:sites], 1), **bounds)


@st.composite
def budgets(draw: st.DrawFn, sites: int, *, same_cost: bool = False) -> RankBudget:
    costs = [draw(_costs)] * sites if same_cost else [draw(_costs) for _ in range(sites)]
    smallest = draw(st.integers(0, 3))
    largest = draw(st.integers(max(1, smallest), 20))
    low, high = smallest * sum(costs), largest * sum(costs)
    total = draw(st.integers(low, high + high // 8) | st.sampled_from((low, high)))
    return RankBudget(total=total, costs=sited(costs), smallest=smallest, largest=largest)
