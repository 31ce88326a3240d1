"""The mathematics of a front: dominance, hypervolume on fixed axes, the knee point."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import moocore
import numpy as np
from numpy.typing import NDArray

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective

Values = Mapping[str, float]


def non_dominated(points: Sequence[Values], objectives: Sequence[Objective]) -> list[bool]:
    """Say of each point whether no other point is at least as good everywhere and better somewhere.

    Equal points are kept: none of them dominates the other.
    """
    if not points:
        return []
    kept = moocore.is_nondominated(_losses(points, objectives), keep_weakly=True)
    return [bool(is_kept) for is_kept in kept]


def dominated(
    points: Sequence[Values], others: Sequence[Values], objectives: Sequence[Objective]
) -> list[bool]:
    """Say of each point whether one of the others is at least as good everywhere and better somewhere."""
    if not points or not others:
        return [False] * len(points)
    losses, bounds = _losses(points, objectives)[:, None], _losses(others, objectives)
    is_worse = np.all(bounds <= losses, axis=2) & np.any(bounds < losses, axis=2)
    return [bool(is_dominated) for is_dominated in np.any(is_worse, axis=1)]


def non_dominated_sort(points: Sequence[Values], objectives: Sequence[Objective]) -> list[list[int]]:
    """Return the indices of finite points in layers: each is the front of what is left without those before.

    Computed by moocore (Jensen, "Reducing the Run-Time Complexity of Multiobjective EAs", 2003).
    """
    if not points:
        return []
    ranks = moocore.pareto_rank(_losses(points, objectives))
    return [np.flatnonzero(ranks == rank).tolist() for rank in range(int(ranks.max()) + 1)]


def front_records(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the completed, non-dominated records; a duplicate's original stands for it."""
    complete = [
        record for record in records if record.evaluation.status == "complete" and record.duplicate_of is None
    ]
    flags = non_dominated([record.evaluation.values for record in complete], objectives)
    return list(compress(complete, flags))


def _losses(points: Sequence[Values], objectives: Sequence[Objective]) -> NDArray[np.float64]:
    signs = [(objective.name, -1.0 if objective.direction == "maximize" else 1.0) for objective in objectives]
    return np.array([[sign * point[name] for name, sign in signs] for point in points], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of the unit cube in which hypervolume is taken: 0 is the worst value, 1 the best."""

    objective: Objective  # what is measured along it
    worst: float  # value at 0; anything worse counts as 0
    best: float  # value at 1; anything better counts as 1

    def __post_init__(self) -> None:
        better = self.best > self.worst if self.objective.direction == "maximize" else self.best < self.worst
        if not better:
            raise ValueError(
                f"The axis of {self.objective.name} runs from worst {self.worst:g} to best "
                f"{self.best:g}: expected the best to be better."
            )
        if self.objective.log_scale and min(self.worst, self.best) <= 0:
            raise ValueError(f"The axis of {self.objective.name} is logarithmic: both ends must be above 0.")

    def position(self, value: float) -> float:
        """Return where a value lies on the axis, in [0, 1]."""
        worst, best = self.worst, self.best
        if self.objective.log_scale:
            value = math.log(max(value, 1e-300))
            worst, best = math.log(worst), math.log(best)
        return min(1.0, max(0.0, (value - worst) / (best - worst)))


def fixed_axes(
    objectives: Sequence[Objective],
    metric_bounds: Mapping[str, tuple[float, float]],
    ends: Sequence[Mapping[str, float]],
) -> tuple[Axis, ...]:
    """Return an axis for each objective whose ends are known before training.

    `metric_bounds` has the trivial score and the best value of each metric, `ends` what the space's smallest
    and its largest configuration cost.
    """
    axes = []
    for objective in objectives:
        if objective.is_metric:
            worst, best = metric_bounds[objective.name]
            axes.append(Axis(objective=objective, worst=worst, best=best))
        elif objective.before_training:
            best, worst = sorted(end[objective.name] for end in ends)
            if objective.log_scale:
                best = max(best, 1.0)  # the head alone has no adapter parameters
            if best < worst:
                axes.append(Axis(objective=objective, worst=worst, best=best))
    return tuple(axes)


def _axis_losses(points: Sequence[Values], axes: Sequence[Axis]) -> list[list[float]]:
    return [[1.0 - axis.position(point[axis.objective.name]) for axis in axes] for point in points]


def hypervolume(points: Sequence[Values], axes: Sequence[Axis]) -> float:
    """Return the share of the unit cube that the points dominate, in [0, 1].

    The axes are fixed, so figures can be compared between trials and searches over the same space. Computed
    by moocore (Fonseca, Paquete and López-Ibáñez, "An Improved Dimension-Sweep Algorithm for the Hypervolume
    Indicator", 2006).
    """
    if not points:
        return 0.0
    return float(moocore.hypervolume(np.array(_axis_losses(points, axes)), ref=np.ones(len(axes))))


def contributions(points: Sequence[Values], axes: Sequence[Axis]) -> list[float]:
    """Return what each point adds to the hypervolume of the others; 0 for one that others cover or equal.

    Points that others dominate count for nothing. Computed by moocore (Guerreiro and Fonseca, "Computing and
    Updating Hypervolume Contributions in up to Four Dimensions", 2018).
    """
    if not points:
        return []
    losses = _axis_losses(points, axes)
    if len(axes) == 1:
        losses = [[loss, 0.0] for (loss,) in losses]  # moocore takes two objectives or more
    # Points of a front may be equal on an axis but for rounding, where one then dominates the other.
    shares = moocore.hv_contributions(losses, ref=np.ones(len(losses[0])), ignore_dominated=False)
    return [float(share) for share in shares]


def thinned(
    points: Sequence[Values], axes: Sequence[Axis], most: int, keep: Collection[int] = ()
) -> list[int]:
    """Return the indices of so many points at most, those in `keep` among them, whose hypervolume is large.

    One after another is left out, each time that which adds least to the others: of two that are much alike,
    one stays (Beume, Naujoks and Emmerich, "SMS-EMOA: Multiobjective Selection Based on Dominated
    Hypervolume", 2007).
    """
    kept = list(range(len(points)))
    while len(kept) > most:
        added = contributions([points[index] for index in kept], axes)
        places = [place for place, index in enumerate(kept) if index not in keep]
        del kept[min(places, key=added.__getitem__)]
    return kept


def knee(points: Sequence[Values], axes: Sequence[Axis], tolerance: float = 0.05) -> int:
    """Return the index of the point to take where costs matter, but the metric more.

    Of the points whose metric is almost the best (at most `tolerance` of its axis below it), it is the one
    closest to the best corner of the unit cube (Euclidean, the metric left out).
    """
    metric = next(axis for axis in axes if axis.objective.is_metric)
    places = [metric.position(point[metric.objective.name]) for point in points]
    candidates = [index for index, place in enumerate(places) if place >= max(places) - tolerance]
    costs = [axis for axis in axes if axis is not metric]

    def distance(index: int) -> tuple[float, float]:
        place = [axis.position(points[index][axis.objective.name]) for axis in costs]
        return math.dist(place, [1.0] * len(costs)), -places[index]

    return min(candidates, key=distance)
