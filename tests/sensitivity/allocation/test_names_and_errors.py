from __future__ import annotations

import math
from typing import Any

import pytest

from autopeft.sensitivity.allocation import ALLOCATORS, Allocator, RankBudget
from autopeft.sensitivity.allocation.rules import gora, proportional
from tests.sensitivity.allocation.cases import (
    SITES,
    equal_costs,
    ranks_of,
    sited,
)


class TestErrors:
    @pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=lambda allocator: allocator.name)
    def test_of_sites(self, allocator: Allocator) -> None:
        value: Any = [1.0] if allocator.evidence == "spectra" else 1.0
        with pytest.raises(ValueError, match="No sites to give ranks to: expected at least one"):
            allocator({}, equal_costs(8, 2))
        with pytest.raises(ValueError, match=r"0\.ffn_down has no cost"):
            allocator(sited([value] * 3), equal_costs(8, 2))
        with pytest.raises(ValueError, match=r"budget of 8 does not pay for rank 5 at all 2 sites.*costs 10"):
            allocator(sited([value] * 2), equal_costs(8, 2, smallest=5))

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
    @pytest.mark.parametrize("allocator", ALLOCATORS.values(), ids=lambda allocator: allocator.name)
    def test_of_numbers(self, allocator: Allocator, value: float) -> None:
        evidence = sited([[1.0], [1.0, value]] if allocator.evidence == "spectra" else [1.0, value])
        message = rf"{allocator.evidence} of 0\.value contain {value}: expected finite"
        with pytest.raises(ValueError, match=message):
            allocator(evidence, equal_costs(8, 2))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"total": -1}, "total of a budget is a whole number from 0 up, got -1"),
            ({"total": 2e6}, "total of a budget is a whole number from 0 up, got 2000000.0"),
            ({"smallest": -1}, "smallest rank is a whole number from 0 up, got -1"),
            ({"largest": 0}, "largest rank is a whole number from 1 up, got 0"),
            ({"smallest": 8, "largest": 4}, "largest rank is a whole number from 8 up, got 4"),
            ({"costs": {}}, "needs the cost of a rank at each site, got no costs"),
            ({"costs": {SITES[1]: 0}}, r"rank at 0\.value is a whole number from 1 up, got 0"),
            ({"costs": {SITES[1]: True}}, r"rank at 0\.value is a whole number from 1 up, got True"),
        ],
    )
    def test_of_budgets(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RankBudget(**{"total": 8, "costs": {SITES[0]: 1}, **changes})


class TestByName:
    def test_names(self) -> None:
        assert all(rule.name == name for name, rule in ALLOCATORS.items())
        assert ALLOCATORS["gora"] is gora

    def test_options(self) -> None:
        assert dict(ALLOCATORS["proportional"].options) == {"temperature": 1.0}
        assert dict(ALLOCATORS["gora"].options) == {}
        scores, budget = sited([9, 1]), equal_costs(8, 2)
        assert ranks_of(ALLOCATORS["proportional"](scores, budget, temperature=0.0)) == [4, 4]

    def test_an_unknown_option_is_answered_with_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"option of the allocator 'proportional'.*'temperature'"):
            ALLOCATORS["proportional"](sited([1]), equal_costs(8, 1), temprature=2.0)

    def test_costs_may_name_sites_that_are_not_scored(self) -> None:
        assert ranks_of(proportional(sited([1, 1]), equal_costs(8, 12))) == [4, 4]
