from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autopeft.sensitivity.allocation import (
    RankBudget,
    sensitive_counts,
    structured,
)
from tests.sensitivity.allocation.cases import (
    SITES,
    coarse_values,
    equal_costs,
    property_test,
    ranks_of,
    sited,
)


class TestStructured:
    def test_threshold(self) -> None:
        # LoRA of rank 8 has 8·100 parameters: 800/5 = 160 sensitive weights are enough, 159 are not.
        counts, budget = sited([160, 159, 400]), RankBudget(total=2400, costs=sited([100, 100, 100]))
        assert ranks_of(structured(counts, budget)) == [12, 0, 12]
        assert ranks_of(structured(counts, budget, alpha=2.0)) == [0, 0, 24]
        assert ranks_of(structured(counts, budget, rank=2)) == [8, 8, 8]

    def test_what_the_chosen_cannot_take_goes_to_the_others(self) -> None:
        budget = RankBudget(total=1600, costs=sited([100, 100, 100]), largest=6)
        assert ranks_of(structured(sited([160, 159, 400]), budget)) == [6, 4, 6]

    def test_where_none_is_chosen_the_most_sensitive_comes_first(self) -> None:
        budget = RankBudget(total=1600, costs=sited([100, 100]), largest=12)
        assert ranks_of(structured(sited([1, 2]), budget)) == [4, 12]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"alpha": 0.0}, "alpha is a finite number above 0, got 0.0"),
            ({"alpha": math.nan}, "alpha is a finite number above 0, got nan"),
            ({"rank": 0}, "rank of a structured adapter is a whole number from 1 up, got 0"),
        ],
    )
    def test_options_are_checked(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            structured(sited([1, 2]), equal_costs(8, 2), **options)


class TestSensitiveCounts:
    def test_counts_the_most_sensitive_weights_of_all_sites(self) -> None:
        sensitivities = sited([[[9.0, 1.0], [3.0, 0.0]], [7.0, 8.0, 2.0]])
        assert sensitive_counts(sensitivities, 3) == {SITES[0]: 1, SITES[1]: 2}
        assert sensitive_counts(sensitivities, 4) == {SITES[0]: 2, SITES[1]: 2}
        assert sensitive_counts(sensitivities, 0) == {SITES[0]: 0, SITES[1]: 0}
        assert sensitive_counts(sensitivities, 100) == {SITES[0]: 4, SITES[1]: 3}

    def test_ties_go_to_the_earlier_site(self) -> None:
        assert sensitive_counts(sited([[1.0, 1.0], [1.0, 2.0]]), 3) == {SITES[0]: 2, SITES[1]: 1}

    @property_test
    @given(st.lists(st.lists(coarse_values, max_size=5), min_size=1, max_size=5), st.integers(0, 30))
    def test_agrees_with_sorting(self, values: list[list[float]], count: int) -> None:
        assume(any(values))
        pooled = [(-value, site) for site, several in sited(values).items() for value in several]
        selected = [site for _, site in sorted(pooled)[:count]]
        expected = {site: selected.count(site) for site in sited(values)}
        assert sensitive_counts(sited(values), count) == expected

    def test_input_is_checked(self) -> None:
        with pytest.raises(ValueError, match="No weights to select from"):
            sensitive_counts({}, 3)
        with pytest.raises(ValueError, match="No weights to select from"):
            sensitive_counts(sited([[], []]), 3)
        with pytest.raises(ValueError, match="from 0 up, got -1"):
            sensitive_counts(sited([[1.0]]), -1)
        with pytest.raises(ValueError, match=r"at 0\.value is not a number"):
            sensitive_counts(sited([[1.0], [math.nan]]), 1)
