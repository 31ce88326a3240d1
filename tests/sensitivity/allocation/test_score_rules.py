from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autopeft.sensitivity.allocation import RankBudget
from autopeft.sensitivity.allocation.rules import (
    fisher,
    gora,
    proportional,
    top_k,
)
from tests.sensitivity.allocation.cases import (
    SITES,
    budgets,
    equal_costs,
    ranks_of,
    sited,
    some_scores,
)


class TestProportional:
    def test_largest_remainder(self) -> None:
        # Shares 5, 3.33, 1.67 of 10: the whole ones are 5, 3, 1, the largest remainder is the third's.
        assert ranks_of(proportional(sited([3, 2, 1]), equal_costs(10, 3))) == [5, 3, 2]

    def test_temperature(self) -> None:
        # Weights √9 : √1 = 3 : 1, then 81 : 1, of 8.
        scores, budget = sited([9, 1]), equal_costs(8, 2)
        assert ranks_of(proportional(scores, budget, temperature=0.5)) == [6, 2]
        assert ranks_of(proportional(scores, budget, temperature=2.0)) == [8, 0]

    def test_ranks_and_not_parameters_are_in_proportion(self) -> None:
        # λ(1·100 + 1·300) = 4000: both get rank 10.
        budget = RankBudget(total=4000, costs=sited([100, 300]))
        assert ranks_of(proportional(sited([1, 1]), budget)) == [10, 10]

    def test_what_a_cap_leaves_is_divided_in_proportion(self) -> None:
        # The first is capped at 8; 12 are left for the others, 2 : 1.
        assert ranks_of(proportional(sited([100, 2, 1]), equal_costs(20, 3, largest=8))) == [8, 8, 4]

    def test_what_a_floor_takes_is_missing_to_the_others_in_proportion(self) -> None:
        # The third has 4 by its floor; 12 are left for the others, 2 : 1.
        assert ranks_of(proportional(sited([20, 10, 1]), equal_costs(16, 3, smallest=4))) == [8, 4, 4]

    @given(some_scores, st.data())
    def test_temperature_zero_is_uniform(self, values: list[float], data: st.DataObject) -> None:
        budget = data.draw(budgets(len(values)))
        ones = dict.fromkeys(sited(values), 1.0)
        assert proportional(sited(values), budget, temperature=0.0) == proportional(ones, budget)

    @given(st.integers(1, len(SITES)), st.data())
    def test_uniform_ranks_differ_by_one_at_most_at_equal_costs(
        self, sites: int, data: st.DataObject
    ) -> None:
        budget = data.draw(budgets(sites, same_cost=True))
        ranks = ranks_of(proportional(sited(range(sites)), budget, temperature=0.0))
        assert max(ranks) - min(ranks) <= 1
        assert ranks == sorted(ranks, reverse=True)

    @given(some_scores, st.data())
    def test_agrees_with_shares_found_by_bisection(self, values: list[float], data: st.DataObject) -> None:
        budget = data.draw(budgets(len(values)))
        best = max(values)
        assume(best > 0 and all(value == 0 or value > 1e-6 * best for value in values))
        weights = np.array(values) / best
        costs = np.array(list(budget.costs.values()))
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            shares = np.clip(middle * weights, budget.smallest, budget.largest)
            low, high = (middle, high) if shares @ costs < budget.total else (low, middle)
        found = np.array(ranks_of(proportional(sited(values), budget)))
        # What cannot be paid is missing at one site, what is left goes to cheaper ones.
        assert np.all(found >= np.floor(shares - 1e-4))
        if len(set(costs)) == 1:
            below_cap = np.array([weight > 0 for weight in weights])
            assert np.all(found[below_cap] <= np.ceil(shares + 1e-4)[below_cap])

    def test_a_steep_temperature_gives_all_to_the_best(self) -> None:
        scores = sited([1e-300, 1.0, 0.999])
        assert ranks_of(proportional(scores, equal_costs(16, 3), temperature=1e6)) == [0, 16, 0]

    @pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
    def test_temperature_must_be_a_number_of_at_least_zero(self, temperature: float) -> None:
        with pytest.raises(ValueError, match=r"temperature must be a finite number of at least 0, got"):
            proportional(sited([1, 2]), equal_costs(8, 2), temperature=temperature)


class TestGora:
    def test_parameters_and_not_ranks_are_in_proportion(self) -> None:
        # Of 4000 parameters 2000 each: ranks ⌊2000/100⌋ and ⌊2000/300⌋ = 6; 200 are left, two ranks of 100.
        budget = RankBudget(total=4000, costs=sited([100, 300]))
        assert ranks_of(gora(sited([1, 1]), budget)) == [22, 6]

    def test_the_published_formula_where_nothing_is_left(self) -> None:
        # f = 2·768 and 768 + 3072, r_ref = 8: B = 8·(1536 + 1536 + 3840) = 55296; I/ΣI = 1/2, 1/4, 1/4.
        costs = [1536, 1536, 3840]
        budget = RankBudget(total=55296, costs=sited(costs), largest=32)
        ranks = ranks_of(gora(sited([0.02, 0.01, 0.01]), budget))
        shares = [round(55296 * share) for share in (0.5, 0.25, 0.25)]
        assert [share // cost for share, cost in zip(shares, costs, strict=True)] == [18, 9, 3]
        # 55296 − 27·1536 − 3·3840 = 2304 pay for no rank at 3840, but for one at 1536.
        assert ranks == [19, 9, 3]

    def test_caps(self) -> None:
        assert ranks_of(gora(sited([8, 1, 1]), equal_costs(20, 3, largest=10))) == [10, 5, 5]


class TestFisher:
    def test_in_proportion(self) -> None:
        # n·r = 3·4, shares 6, 4, 2.
        assert ranks_of(fisher(sited([3, 2, 1]), equal_costs(12, 3))) == [6, 4, 2]

    def test_what_the_cap_leaves_is_spread_evenly(self) -> None:
        # Shares 18, 4, 2 of 24; the first is clamped to 12, and each other gets half of the 6 it leaves.
        # `proportional` divides the 12 that are left 2 : 1 instead.
        scores, budget = sited([9, 2, 1]), equal_costs(24, 3, largest=12)
        assert ranks_of(fisher(scores, budget)) == [12, 7, 5]
        assert ranks_of(proportional(scores, budget)) == [12, 8, 4]

    def test_floors_do_not_overspend(self) -> None:
        # The case in which the proposal's own code spends 11 of 8 (axolotl #3639).
        assert ranks_of(fisher(sited([100.0, 0.1]), equal_costs(8, 2, smallest=3, largest=8))) == [5, 3]

    def test_unequal_costs(self) -> None:
        # N = 8000 / (3/4·100 + 1/4·100) ranks at equal costs of 100: 80, shares 60 and 20.
        budget = RankBudget(total=8000, costs=sited([100, 100]))
        assert ranks_of(fisher(sited([3, 1]), budget)) == [60, 20]
        # λ(3·100 + 1·500) = 8000: λ = 10.
        budget = RankBudget(total=8000, costs=sited([100, 500]))
        assert ranks_of(fisher(sited([3, 1]), budget)) == [30, 10]


class TestTopK:
    def test_the_best_share_gets_equal_ranks(self) -> None:
        budget = equal_costs(16, 4)
        assert ranks_of(top_k(sited([1, 4, 2, 3]), budget)) == [0, 8, 0, 8]
        assert ranks_of(top_k(sited([1, 4, 2, 3]), budget, share=0.25)) == [0, 16, 0, 0]
        assert ranks_of(top_k(sited([1, 4, 2, 3]), budget, share=1.0)) == [4, 4, 4, 4]

    def test_the_number_of_sites_is_rounded_up_but_not_by_rounding_errors(self) -> None:
        scores, budget = sited(range(12)), equal_costs(12, 12)
        for chosen in range(1, 13):
            ranks = ranks_of(top_k(scores, budget, share=chosen / 12))
            assert sum(rank > 0 for rank in ranks) == chosen
        assert sum(rank > 0 for rank in ranks_of(top_k(scores, budget, share=1e-9))) == 1

    def test_what_does_not_divide_goes_to_the_better_ones(self) -> None:
        assert ranks_of(top_k(sited([1, 2, 3]), equal_costs(8, 3), share=1.0)) == [2, 3, 3]

    def test_of_equal_scores_the_earlier_site_is_chosen(self) -> None:
        assert ranks_of(top_k(sited([1, 1, 1, 1]), equal_costs(8, 4))) == [4, 4, 0, 0]

    def test_the_next_best_gets_what_the_chosen_cannot_take(self) -> None:
        assert ranks_of(top_k(sited([1, 4, 2, 3]), equal_costs(20, 4, largest=8))) == [0, 8, 4, 8]

    @pytest.mark.parametrize("share", [0.0, 1.5, -1.0, math.nan])
    def test_the_share_is_a_share(self, share: float) -> None:
        with pytest.raises(ValueError, match="share must be a number above 0 and at most 1, got"):
            top_k(sited([1, 2]), equal_costs(8, 2), share=share)
