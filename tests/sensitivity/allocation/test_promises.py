from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autopeft.core.adapter import Site
from autopeft.sensitivity.allocation import ALLOCATORS, Allocator, RankBudget, Ranks
from autopeft.sensitivity.allocation.rules import (
    explained_variance,
    fisher,
    gora,
    proportional,
    water_filling,
)
from tests.sensitivity.allocation.cases import (
    SITES,
    budgets,
    equal_costs,
    ranks_of,
    sited,
    some_scores,
    some_spectra,
)

OF_SCORES = [allocator for allocator in ALLOCATORS.values() if allocator.evidence == "scores"]
OF_SPECTRA = [allocator for allocator in ALLOCATORS.values() if allocator.evidence == "spectra"]

_options: Mapping[str, st.SearchStrategy[float]] = {
    "temperature": st.sampled_from((0.0, 0.5, 1.0, 2.0, 50.0)) | st.floats(0, 4),
    "share": st.floats(0.01, 1),
    "rho": st.floats(1, 4),
}


@dataclass(frozen=True)
class Case:
    allocator: Allocator
    evidence: dict[Site, Any]
    budget: RankBudget
    options: dict[str, float]

    def ranks(self) -> Ranks:
        return self.allocator(self.evidence, self.budget, **self.options)

    @property
    def cap(self) -> int:
        """The rank no site exceeds; EVA's has a second bound."""
        if self.allocator.name != "explained_variance":
            return self.budget.largest
        uniform = self.budget.total / sum(self.budget.costs.values())
        second = math.ceil(round(self.options["rho"] * uniform, 6))
        return min(self.budget.largest, max(self.budget.smallest, second))


@st.composite
def _cases(draw: st.DrawFn, allocator: Allocator) -> Case:
    evidence = sited(draw(some_spectra if allocator.evidence == "spectra" else some_scores))
    options = {name: draw(_options[name]) for name in allocator.options}
    return Case(allocator, evidence, draw(budgets(len(evidence))), options)


_every_allocator = pytest.mark.parametrize(
    "allocator", ALLOCATORS.values(), ids=lambda allocator: allocator.name
)


class TestPromises:
    @_every_allocator
    @given(data=st.data())
    def test_ranks_keep_their_bounds(self, allocator: Allocator, data: st.DataObject) -> None:
        case = data.draw(_cases(allocator))
        ranks = case.ranks()
        assert list(ranks) == sorted(case.evidence)
        assert all(type(rank) is int for rank in ranks.values())
        assert all(case.budget.smallest <= rank <= case.cap for rank in ranks.values())

    @_every_allocator
    @given(data=st.data())
    def test_the_budget_is_spent_to_within_one_rank_and_never_exceeded(
        self, allocator: Allocator, data: st.DataObject
    ) -> None:
        case = data.draw(_cases(allocator))
        ranks, costs = case.ranks(), case.budget.costs
        left = case.budget.total - sum(costs[site] * rank for site, rank in ranks.items())
        assert left >= 0
        assert left < min((costs[site] for site, rank in ranks.items() if rank < case.cap), default=math.inf)

    @_every_allocator
    @given(data=st.data())
    def test_the_order_of_the_input_does_not_matter(self, allocator: Allocator, data: st.DataObject) -> None:
        case = data.draw(_cases(allocator))
        evidence = dict(data.draw(st.permutations(list(case.evidence.items()))))
        costs = dict(sorted(case.budget.costs.items(), reverse=True))
        budget = dataclasses.replace(case.budget, costs=costs)
        shuffled = Case(allocator, evidence, budget, case.options)
        assert list(shuffled.ranks().items()) == list(case.ranks().items())

    @pytest.mark.parametrize("allocator", OF_SCORES, ids=lambda allocator: allocator.name)
    @given(data=st.data())
    def test_scores_have_no_unit(self, allocator: Allocator, data: st.DataObject) -> None:
        values = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=len(SITES)))
        factor = data.draw(st.floats(1e-6, 1e6))
        budget = data.draw(budgets(len(values)))
        scaled = {site: score * factor for site, score in sited(values).items()}
        assert allocator(scaled, budget) == allocator(sited(values), budget)

    @pytest.mark.parametrize("allocator", OF_SPECTRA, ids=lambda allocator: allocator.name)
    @given(data=st.data())
    def test_spectra_have_no_unit(self, allocator: Allocator, data: st.DataObject) -> None:
        spectra = sited(data.draw(some_spectra))
        # A power of two, so that no value is rounded; and none that vanishes.
        factor = 2.0 ** data.draw(st.integers(-20, 20))
        assume(all(value == 0 or value > 1e-100 for spectrum in spectra.values() for value in spectrum))
        budget = data.draw(budgets(len(spectra)))
        scaled = {site: [value * factor for value in spectrum] for site, spectrum in spectra.items()}
        assert allocator(scaled, budget) == allocator(spectra, budget)

    @pytest.mark.parametrize("allocator", OF_SCORES, ids=lambda allocator: allocator.name)
    @given(data=st.data())
    def test_at_equal_costs_a_better_score_never_gets_less(
        self, allocator: Allocator, data: st.DataObject
    ) -> None:
        scores = sited(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=len(SITES))))
        budget = data.draw(budgets(len(scores), same_cost=True))
        ranks = allocator(scores, budget)
        for site, other in itertools.permutations(scores, 2):
            if scores[site] > scores[other]:
                assert ranks[site] >= ranks[other]

    @pytest.mark.parametrize("allocator", [proportional, gora, fisher], ids=lambda allocator: allocator.name)
    @given(data=st.data())
    def test_at_equal_costs_a_site_without_a_score_waits_for_the_others(
        self, allocator: Allocator, data: st.DataObject
    ) -> None:
        scores = sited(data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=len(SITES))))
        budget = data.draw(budgets(len(scores), same_cost=True))
        assume(any(scores.values()))
        ranks = allocator(scores, budget)
        if any(ranks[site] > budget.smallest for site, score in scores.items() if not score):
            assert all(ranks[site] == budget.largest for site, score in scores.items() if score)

    def test_a_site_may_get_no_rank(self) -> None:
        for allocator in OF_SCORES:
            assert ranks_of(allocator(sited([0.0, 5.0]), equal_costs(8, 2)))[0] == 0

    @_every_allocator
    def test_it_stops_where_all_caps_are_reached(self, allocator: Allocator) -> None:
        evidence = sited([[3.0], [2.0], [0.0]] if allocator.evidence == "spectra" else [3.0, 2.0, 0.0])
        assert ranks_of(allocator(evidence, equal_costs(1000, 3, largest=4))) == [4, 4, 4]

    @_every_allocator
    def test_a_budget_of_nothing_gives_nothing(self, allocator: Allocator) -> None:
        evidence = sited([[3.0], [2.0]] if allocator.evidence == "spectra" else [3.0, 2.0])
        assert ranks_of(allocator(evidence, equal_costs(0, 2))) == [0, 0]

    @pytest.mark.parametrize(
        ("allocator", "nothing"),
        [
            *((allocator, 0.0) for allocator in (proportional, gora, fisher)),
            *((allocator, ()) for allocator in (explained_variance, water_filling)),
        ],
        ids=lambda argument: getattr(argument, "name", ""),
    )
    def test_without_any_preference_ranks_are_even_and_ties_go_to_the_earlier_site(
        self, allocator: Allocator, nothing: Any
    ) -> None:
        assert ranks_of(allocator(sited([nothing] * 3), equal_costs(8, 3))) == [3, 3, 2]
