from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.core.objectives import Objective
from autopeft.core.pareto import (
    Axis,
    Values,
    contributions,
    dominated,
    hypervolume,
    knee,
    non_dominated,
    non_dominated_sort,
    thinned,
)

ACCURACY = Objective.score("accuracy")
PARAMETERS = Objective(name="trainable_parameters", direction="minimize", unit="parameters", log_scale=True)
SECONDS = Objective(name="seconds", direction="minimize", unit="seconds")
OBJECTIVES = (ACCURACY, PARAMETERS, SECONDS)
AXES = (
    Axis(objective=ACCURACY, worst=0.0, best=1.0),
    Axis(objective=PARAMETERS, worst=1e6, best=1e2),
    Axis(objective=SECONDS, worst=20.0, best=10.0),
)

# Few different values, so that ties and duplicates are common.
_coarse = st.builds(
    lambda a, p, s: {"accuracy": a / 4, "trainable_parameters": 10.0**p, "seconds": 10.0 + s},
    st.integers(0, 4),
    st.integers(2, 6),
    st.integers(0, 5),
)
_fine = st.fixed_dictionaries(
    {
        # Six digits: what differs in the last bit alone is a tie to one computation and none to another.
        "accuracy": st.floats(0, 1).map(lambda value: float(f"{value:.6g}")),
        "trainable_parameters": st.floats(1, 1e7).map(lambda value: float(f"{value:.6g}")),
        "seconds": st.floats(5, 25).map(lambda value: float(f"{value:.6g}")),
    }
)
points_of_any_kind = st.lists(_coarse, max_size=12) | st.lists(_fine, max_size=8)


def _dominates(values: Values, other: Values, objectives: Sequence[Objective]) -> bool:
    signs = {o.name: 1 if o.direction == "maximize" else -1 for o in objectives}
    gains = [(values[name] - other[name]) * sign for name, sign in signs.items()]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


class TestDominance:
    @given(points_of_any_kind, st.sampled_from((1, 2, 3)))
    def test_agrees_with_comparing_all_pairs(self, points: list[Values], dimensions: int) -> None:
        objectives = OBJECTIVES[:dimensions]
        expected = [not any(_dominates(other, point, objectives) for other in points) for point in points]
        assert non_dominated(points, objectives) == expected

    @given(points_of_any_kind, points_of_any_kind, st.sampled_from((1, 2, 3)))
    def test_by_others_agrees_with_comparing_all_pairs(
        self, points: list[Values], others: list[Values], dimensions: int
    ) -> None:
        objectives = OBJECTIVES[:dimensions]
        expected = [any(_dominates(other, point, objectives) for other in others) for point in points]
        assert dominated(points, others, objectives) == expected

    def test_equal_points_are_all_kept(self) -> None:
        point = {"accuracy": 0.5, "trainable_parameters": 10.0}
        worse = point | {"accuracy": 0.4}
        assert non_dominated([point, worse, dict(point)], OBJECTIVES[:2]) == [True, False, True]

    def test_directions_count(self) -> None:
        points = [{"accuracy": 0.5, "seconds": 1.0}, {"accuracy": 0.6, "seconds": 2.0}]
        assert non_dominated(points, (ACCURACY, SECONDS)) == [True, True]
        points[1]["seconds"] = 1.0
        assert non_dominated(points, (ACCURACY, SECONDS)) == [False, True]

    def test_no_points(self) -> None:
        assert non_dominated([], OBJECTIVES) == []


class TestAxis:
    def test_linear_position(self) -> None:
        axis = Axis(objective=ACCURACY, worst=0.5, best=0.9)
        assert [axis.position(value) for value in (0.5, 0.7, 0.9)] == pytest.approx([0, 0.5, 1])

    def test_logarithmic_position(self) -> None:
        axis = Axis(objective=PARAMETERS, worst=1e6, best=1e2)
        assert [axis.position(value) for value in (1e6, 1e5, 1e4, 1e2)] == pytest.approx([0, 0.25, 0.5, 1])

    def test_is_clipped_at_both_ends(self) -> None:
        axis = Axis(objective=SECONDS, worst=20.0, best=10.0)
        assert [axis.position(value) for value in (25.0, 5.0, math.inf, -math.inf)] == [0, 1, 0, 1]
        assert AXES[1].position(0.0) == 1.0
        assert AXES[1].position(1e9) == 0.0

    @given(_fine, _fine)
    def test_better_values_never_lie_lower(self, values: Values, other: Values) -> None:
        for axis in AXES:
            name = axis.objective.name
            better, worse = (
                (values, other) if _dominates(values, other, (axis.objective,)) else (other, values)
            )
            assert axis.position(better[name]) >= axis.position(worse[name])

    @pytest.mark.parametrize(
        ("objective", "worst", "best"), [(ACCURACY, 0.9, 0.5), (ACCURACY, 0.5, 0.5), (SECONDS, 1, 2)]
    )
    def test_the_best_must_be_better(self, objective: Objective, worst: float, best: float) -> None:
        with pytest.raises(ValueError, match=f"axis of {objective.name} runs from worst .*to be better"):
            Axis(objective=objective, worst=worst, best=best)

    def test_a_logarithm_needs_positive_ends(self) -> None:
        with pytest.raises(ValueError, match="logarithmic: both ends must be above 0"):
            Axis(objective=PARAMETERS, worst=100.0, best=0.0)


def _inclusion_exclusion(points: Sequence[Values], axes: Sequence[Axis]) -> float:
    """Volume of a union of boxes from the worst corner, by every subset's intersection."""
    corners = np.array([[axis.position(p[axis.objective.name]) for axis in axes] for p in points])
    volume = 0.0
    for count in range(1, len(points) + 1):
        for subset in itertools.combinations(range(len(points)), count):
            volume += (-1) ** (count + 1) * float(np.prod(corners[list(subset)].min(axis=0)))
    return volume


class TestHypervolume:
    def test_one_point_is_a_box(self) -> None:
        point = {"accuracy": 0.5, "trainable_parameters": 1e4, "seconds": 15.0}
        assert hypervolume([point], AXES) == pytest.approx(0.5 * 0.5 * 0.5)
        assert hypervolume([point], AXES[:2]) == pytest.approx(0.25)

    @pytest.mark.parametrize("dimensions", [2, 3])
    @settings(max_examples=60)
    @given(points=st.lists(_fine, min_size=1, max_size=6) | st.lists(_coarse, min_size=1, max_size=6))
    def test_agrees_with_inclusion_and_exclusion(self, points: list[Values], dimensions: int) -> None:
        axes = AXES[:dimensions]
        expected = _inclusion_exclusion(points, axes)
        assert hypervolume(points, axes) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("dimensions", [2, 3])
    def test_agrees_with_sampling(self, dimensions: int) -> None:
        generator = np.random.default_rng(0)
        axes = AXES[:dimensions]
        points = [
            {"accuracy": a, "trainable_parameters": 10**p, "seconds": s}
            for a, p, s in zip(
                generator.uniform(0, 1, 30),
                generator.uniform(1, 7, 30),
                generator.uniform(8, 22, 30),
                strict=True,
            )
        ]
        corners = np.array([[axis.position(p[axis.objective.name]) for axis in axes] for p in points])
        samples = generator.uniform(size=(100_000, dimensions))
        covered = np.zeros(len(samples), dtype=bool)
        for corner in corners:
            covered |= (samples <= corner).all(axis=1)
        assert hypervolume(points, axes) == pytest.approx(covered.mean(), abs=0.006)

    @given(points_of_any_kind, _fine)
    def test_never_shrinks_and_stays_within_the_cube(self, points: list[Values], new: Values) -> None:
        before, after = hypervolume(points, AXES), hypervolume([*points, new], AXES)
        assert 0 <= before <= after + 1e-12 <= 1 + 1e-9

    @given(points_of_any_kind)
    def test_only_the_front_counts(self, points: list[Values]) -> None:
        keep = non_dominated(points, OBJECTIVES)
        front = [point for point, kept in zip(points, keep, strict=True) if kept]
        assert hypervolume(front, AXES) == pytest.approx(hypervolume(points, AXES), abs=1e-12)

    def test_the_ideal_point_fills_the_cube(self) -> None:
        ideal = {"accuracy": 1.0, "trainable_parameters": 1.0, "seconds": 1.0}
        assert hypervolume([ideal], AXES) == pytest.approx(1.0)

    def test_points_outside_add_nothing(self) -> None:
        outside = {"accuracy": 0.9, "trainable_parameters": 1e7, "seconds": 12.0}
        assert hypervolume([outside], AXES) == 0.0
        assert hypervolume([], AXES) == 0.0


class TestKnee:
    def test_is_the_cheapest_point_with_almost_the_best_metric(self) -> None:
        points = [
            {"accuracy": 1.0, "trainable_parameters": 1e6},
            {"accuracy": 0.96, "trainable_parameters": 1e3},
            {"accuracy": 0.8, "trainable_parameters": 1e2},
        ]
        assert knee(points, AXES[:2]) == 1
        assert knee(points, AXES[:2], tolerance=0.3) == 2
        assert knee(points, AXES[:2], tolerance=0.0) == 0

    def test_a_head_that_flattens_the_axis_does_not_decide(self) -> None:
        """A head with a dense layer of its own: 14 % more parameters are worth 13 points."""
        axes = (
            Axis(objective=ACCURACY, worst=0.5, best=1.0),
            Axis(objective=PARAMETERS, worst=3e6, best=597e3),
            Axis(objective=SECONDS, worst=20.0, best=10.0),
        )
        points = [
            {"accuracy": 0.775, "trainable_parameters": 597e3, "seconds": 10.0},
            {"accuracy": 0.905, "trainable_parameters": 680e3, "seconds": 15.0},
            {"accuracy": 0.92, "trainable_parameters": 3e6, "seconds": 19.0},
        ]
        assert knee(points, axes) == 1

    def test_the_axis_of_the_metric_decides(self) -> None:
        points = [{"accuracy": 0.88, "seconds": 10.5}, {"accuracy": 0.9, "seconds": 15.0}]
        wide = (Axis(objective=ACCURACY, worst=0, best=1), AXES[2])
        narrow = (Axis(objective=ACCURACY, worst=0.8, best=1), AXES[2])
        assert knee(points, wide) == 0
        assert knee(points, narrow) == 1

    @given(st.lists(_fine, min_size=1, max_size=8))
    def test_no_point_as_good_is_closer(self, points: list[Values]) -> None:
        def distance(point: Values) -> float:
            return math.sqrt(sum((1 - axis.position(point[axis.objective.name])) ** 2 for axis in AXES[1:]))

        chosen = points[knee(points, AXES, tolerance=0.1)]
        best = max(point["accuracy"] for point in points)
        assert chosen["accuracy"] >= best - 0.1
        almost = [point for point in points if point["accuracy"] >= best - 0.1]
        assert distance(chosen) == pytest.approx(min(map(distance, almost)))


class TestNonDominatedSort:
    @given(points_of_any_kind, st.sampled_from((1, 2, 3)))
    def test_each_layer_is_the_front_of_what_is_left(self, points: list[Values], dimensions: int) -> None:
        objectives = OBJECTIVES[:dimensions]
        left = list(range(len(points)))
        for layer in non_dominated_sort(points, objectives):
            flags = non_dominated([points[index] for index in left], objectives)
            assert layer == [index for index, flag in zip(left, flags, strict=True) if flag]
            left = [index for index in left if index not in layer]
        assert left == []


_inside = st.fixed_dictionaries(
    {
        "accuracy": st.floats(0, 1),
        "trainable_parameters": st.floats(1e2, 1e6),
        "seconds": st.floats(10, 20),
    }
)


@given(st.lists(_inside, max_size=8), st.sampled_from((1, 2, 3)))
def test_contributions_of_a_front_are_what_is_lost_without_each_point(
    points: list[Values], dimensions: int
) -> None:
    axes = AXES[:dimensions]
    flags = non_dominated(points, OBJECTIVES[:dimensions])
    front = [point for point, flag in zip(points, flags, strict=True) if flag]
    whole = hypervolume(front, axes)
    others = [[*front[:index], *front[index + 1 :]] for index in range(len(front))]
    expected = [whole - hypervolume(points, axes) for points in others]
    assert contributions(front, axes) == pytest.approx(expected, abs=1e-7)  # differences of nearly 1


def test_what_points_add_to_the_hypervolume() -> None:
    def point(accuracy: float, parameters: float) -> Values:
        return {"accuracy": accuracy, "trainable_parameters": parameters}

    points = [point(0.5, 1e2), point(1.0, 1e6), point(0.5, 1e4), point(0.75, 1e4)]
    # In the unit square (accuracy, parameters): (0.5, 1), (1, 0), (0.5, 0.5), (0.75, 0.5).
    found = contributions(points, AXES[:2])
    assert found == pytest.approx([0.5 * 0.5, 0.0, 0.0, 0.25 * 0.5])
    assert contributions([], AXES) == []


def test_of_points_that_are_much_alike_one_stays() -> None:
    alike = [{"accuracy": 0.9 + step / 1e4, "trainable_parameters": 1e5 + step} for step in range(3)]
    apart = {"accuracy": 0.4, "trainable_parameters": 1e3}
    points = [*alike, apart]
    assert max(range(4), key=contributions(points, AXES[:2]).__getitem__) == 3
    assert len(kept := thinned(points, AXES[:2], 2)) == 2
    assert 3 in kept
    assert thinned(points, AXES[:2], 2, keep=[0]) == [0, 3]
    assert thinned(points, AXES[:2], 4) == [0, 1, 2, 3]


@given(st.lists(_inside, max_size=8), st.integers(1, 8))
def test_the_least_is_left_out(points: list[Values], most: int) -> None:
    kept = thinned(points, AXES, most)
    assert len(kept) == min(most, len(points))
    assert kept == sorted(kept)
    if len(points) == most + 1:
        rest = ([*points[:index], *points[index + 1 :]] for index in range(len(points)))
        largest = max(hypervolume(others, AXES) for others in rest)
        assert hypervolume([points[index] for index in kept], AXES) == pytest.approx(largest, abs=1e-9)
