"""What the benchmark of transfer makes of runs, and its match that is made wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from benchmarks.transfer import rows, units_to, upside_down


def found_run(prior: str, seed: int, curve: list[tuple[float, float]]) -> dict[str, Any]:
    ends = dict.fromkeys(("test", "trials", "from_earlier", "from_earlier_on_front"), 1.0)
    return {
        "target": "questions",
        "prior": prior,
        "seed": seed,
        "curve": curve,
        "validation": curve[-1][1],
        **ends,
    }


def test_units_are_those_at_which_a_level_is_first_reached() -> None:
    curve = [(0.5, 0.1), (1.0, 0.4), (2.0, 0.3)]
    assert [units_to(curve, level) for level in (0.1, 0.2, 0.4, 0.5)] == [0.5, 1.0, 1.0, math.inf]


def test_levels_are_shares_of_what_searches_without_a_prior_have() -> None:
    slow, fast = [(1.0, 0.2), (2.0, 0.4)], [(0.5, 0.38), (1.5, 0.4)]
    runs = [found_run(prior, 0, curve) for prior, curve in (("none", slow), ("spam", fast))]
    without, having = rows(2 * runs)
    assert without["units_to"] == {"90%": 2.0, "95%": 2.0, "100%": 2.0}
    assert having["units_to"] == {"90%": 0.5, "95%": 0.5, "100%": 1.5}
    assert having["relative"] == {"90%": 0.25, "95%": 0.25, "100%": 0.75}
    assert (without["prior"], having["prior"]) == ("none", "spam")


def test_a_wrong_match_is_upside_down() -> None:
    point = Configuration({Site(5, "query"): Adapter("lora", 4), Site(1, "value"): Adapter("lora", 2)})
    turned = upside_down(point, 6)
    expected = {Site(0, "query"): (Adapter("lora", 4),), Site(4, "value"): (Adapter("lora", 2),)}
    assert turned.adapters == expected
    assert turned.learning_rate == pytest.approx(0.1 * point.learning_rate)
