"""The verdict on two fronts: "beats" where there is a difference, and "no better" where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.core.pareto import Axis
from autopeft.reporting.verdict import FinalPoint, Verdict, compare, joint_axes

ACCURACY, PARAMETERS = resolve_objectives(("accuracy", "trainable_parameters"), [Objective.score("accuracy")])
AXES = (
    Axis(objective=ACCURACY, worst=0.2, best=1.0),
    Axis(objective=PARAMETERS, worst=1e6, best=1e2),
)
ROWS, SEEDS, SAMPLES = 400, 3, 100


def point(accuracy: float, parameters: float, generator: np.random.Generator) -> FinalPoint:
    """Return a point whose rows are right with a probability, resampled as the test split is."""
    draws = np.random.default_rng(0).multinomial(ROWS, [1 / ROWS] * ROWS, size=SAMPLES)
    weights = np.vstack([np.ones(ROWS), draws]) / ROWS
    right = generator.random((SEEDS, ROWS)) < accuracy
    return FinalPoint(costs={"trainable_parameters": parameters}, tests=right @ weights.T)


def verdict(seed: int, search: float, uniform: float) -> Verdict:
    generator = np.random.default_rng(seed)
    ours = [point(search, 1e4, generator), point(search - 0.1, 1e3, generator)]
    theirs = [point(uniform, 1e4, generator), point(uniform - 0.1, 1e3, generator)]
    return compare(
        ours,
        theirs,
        AXES,
        ACCURACY,
        head="accuracy 0.5 of the head alone",
        share=0.5,
        take="lora(8) everywhere",
    )


def test_a_planted_difference_is_found() -> None:
    found = verdict(0, search=0.9, uniform=0.75)
    assert found.beats
    assert str(found).startswith("The front beats a uniform LoRA sweep: +0.1")
    assert "accuracy 0.5 of the head alone; 3 fresh seeds, a sweep of 50% of the search's compute" in str(
        found
    )
    assert "lora(8)" not in str(found)
    expected = (0.9 - 0.75) / 0.8 * (np.log(1e6 / 1e3) / np.log(1e4))
    assert found.search - found.uniform == pytest.approx(expected, abs=2 * found.margin)


def test_where_nothing_is_better_it_says_so() -> None:
    found = [verdict(seed, search=0.8, uniform=0.8) for seed in range(40)]
    assert sum(each.beats for each in found) <= 3
    worse = verdict(0, search=0.75, uniform=0.9)
    assert not worse.beats
    assert str(worse).startswith("No better than a uniform LoRA sweep, -0.")
    assert str(worse).endswith("take lora(8) everywhere.")


def test_it_says_where_the_head_alone_stands_for_the_sweep() -> None:
    found = replace(verdict(0, search=0.9, uniform=0.75), share=0.0)
    assert "3 fresh seeds, the head alone in its place, as no uniform LoRA could be trained" in str(found)


def test_notebooks_get_the_verdict_escaped() -> None:
    found = replace(verdict(0, search=0.75, uniform=0.9), take="<lora>")
    assert "take &lt;lora&gt;." in found._repr_html_()


def test_axes_span_both_spaces() -> None:
    wider = (AXES[0], Axis(objective=PARAMETERS, worst=1e7, best=1e3))
    (metric, cost) = joint_axes(AXES, wider)
    assert metric == AXES[0]
    assert (cost.worst, cost.best) == (1e7, 1e2)
