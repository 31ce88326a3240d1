from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.adapter import Site
from autopeft.sensitivity.allocation import RankBudget
from autopeft.sensitivity.allocation.rules import (
    explained_variance,
    water_filling,
)
from tests.sensitivity.allocation.cases import (
    coarse_values,
    equal_costs,
    ranks_of,
    sited,
)


class TestExplainedVariance:
    def test_the_best_components_of_all_sites_are_kept(self) -> None:
        # Of all ratios the best six are .7, .5, .3, .3, .2, .1 (the last in the first site).
        spectra = sited([[0.5, 0.3, 0.1, 0.05], [0.7, 0.02, 0.01], [0.3, 0.2, 0.09]])
        assert ranks_of(explained_variance(spectra, equal_costs(6, 3))) == [3, 1, 2]

    def test_no_site_exceeds_rho_times_the_uniform_rank(self) -> None:
        spectra = sited([[0.3, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]])
        budget = equal_costs(4, 2)
        assert ranks_of(explained_variance(spectra, budget, rho=2.0)) == [4, 0]
        assert ranks_of(explained_variance(spectra, budget, rho=1.5)) == [3, 1]
        assert ranks_of(explained_variance(spectra, budget, rho=1.0)) == [2, 2]

    def test_the_cap_is_rounded_up_so_that_the_budget_can_be_spent(self) -> None:
        spectra = sited([[0.3, 0.2, 0.2], [0.1, 0.1, 0.1]])
        assert ranks_of(explained_variance(spectra, equal_costs(3, 2), rho=1.0)) == [2, 1]

    def test_components_that_are_not_given_come_last(self) -> None:
        assert ranks_of(explained_variance(sited([[0.9], [0.2, 0.1]]), equal_costs(3, 2))) == [1, 2]
        assert ranks_of(explained_variance(sited([[0.9], [0.2, 0.1]]), equal_costs(6, 2))) == [3, 3]

    def test_costs_do_not_change_the_order(self) -> None:
        budget = RankBudget(total=500, costs=sited([400, 100]))
        assert ranks_of(explained_variance(sited([[0.5], [0.4, 0.3]]), budget)) == [1, 1]

    @pytest.mark.parametrize("rho", [0.9, math.nan])
    def test_rho_is_at_least_one(self, rho: float) -> None:
        with pytest.raises(ValueError, match="rho must be a finite number of at least 1, got"):
            explained_variance(sited([[1.0]]), equal_costs(8, 1), rho=rho)


def _gain(spectra: Mapping[Site, Sequence[float]], ranks: Sequence[int]) -> float:
    largest_first = (sorted(spectra[site], reverse=True) for site in sorted(spectra))
    return sum(
        sum(s**2 for s in spectrum[:rank]) for spectrum, rank in zip(largest_first, ranks, strict=True)
    )


def _best_gain(spectra: Mapping[Site, Sequence[float]], budget: RankBudget) -> float:
    """The highest gain of any ranks the budget pays for, by trying them all."""
    costs = list(budget.costs.values())
    choices = itertools.product(range(budget.smallest, budget.largest + 1), repeat=len(costs))
    payable = (ranks for ranks in choices if np.dot(ranks, costs) <= budget.total)
    return max(_gain(spectra, ranks) for ranks in payable)


_small_spectra = st.lists(st.lists(coarse_values | st.floats(0, 10), max_size=4), min_size=1, max_size=3)


@st.composite
def _small_budgets(draw: st.DrawFn, costs: Sequence[int]) -> RankBudget:
    smallest = draw(st.integers(0, 1))
    largest = draw(st.integers(max(1, smallest), 5))
    total = draw(st.integers(smallest * sum(costs), largest * sum(costs)))
    return RankBudget(total=total, costs=sited(costs), smallest=smallest, largest=largest)


class TestWaterFilling:
    def test_squares_of_singular_values_for_their_cost(self) -> None:
        # σ²: 16, 9 | 25, 1 at equal costs: 25, 16, 9.
        spectra = sited([[4.0, 3.0], [5.0, 1.0]])
        assert ranks_of(water_filling(spectra, equal_costs(3, 2))) == [2, 1]
        # At costs 1 and 3, σ²/cost: 16, 9 | 8.33, 0.33; after the first site's two, 3 pay for the second's.
        assert ranks_of(water_filling(spectra, RankBudget(total=5, costs=sited([1, 3])))) == [2, 1]
        # With 4 in all, the second site's first rank cannot be paid any more: the first site takes it all.
        assert ranks_of(water_filling(spectra, RankBudget(total=4, costs=sited([1, 3])))) == [4, 0]

    @given(_small_spectra, st.data())
    def test_is_optimal_at_equal_costs(self, values: list[list[float]], data: st.DataObject) -> None:
        budget = data.draw(_small_budgets([data.draw(st.sampled_from((1, 7)))] * len(values)))
        found = _gain(sited(values), ranks_of(water_filling(sited(values), budget)))
        assert found == pytest.approx(_best_gain(sited(values), budget))

    @given(_small_spectra, st.data())
    def test_misses_the_optimum_by_less_than_one_component_at_unequal_costs(
        self, values: list[list[float]], data: st.DataObject
    ) -> None:
        costs = data.draw(st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values)))
        budget = data.draw(_small_budgets(costs))
        found = _gain(sited(values), ranks_of(water_filling(sited(values), budget)))
        one_component = max((value**2 for several in values for value in several), default=0.0)
        assert found >= _best_gain(sited(values), budget) - one_component - 1e-9

    def test_values_that_overflow_or_vanish_when_squared(self) -> None:
        budget = equal_costs(3, 2)
        for unit in (1e300, 1e-300):
            spectra = sited([[4 * unit, 3 * unit], [5 * unit, unit]])
            assert ranks_of(water_filling(spectra, budget)) == [2, 1]
