"""The mathematics of a front: dominance, hypervolume on fixed axes, the knee point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np
from numpy.typing import NDArray

from autopeft.core.objectives import Objective

Values = Mapping[str, float]


def non_dominated(points: Sequence[Values], objectives: Sequence[Objective]) -> list[bool]:
    """Say of each point whether no other point is at least as good everywhere and better somewhere.

    Equal points are kept: none of them dominates the other. A point with NaN is never on the front.
    """
    if not points:
        return []
    losses = _losses(points, objectives)
    finite = np.isfinite(losses).all(axis=1)
    keep = np.zeros(len(points), dtype=bool)
    if finite.any():
        keep[finite] = moocore.is_nondominated(losses[finite], keep_weakly=True)
    return [bool(one) for one in keep]


def _losses(points: Sequence[Values], objectives: Sequence[Objective]) -> NDArray[np.float64]:
    signs = np.array([-1.0 if one.direction == "maximize" else 1.0 for one in objectives])
    values = np.array([[point[one.name] for one in objectives] for point in points], dtype=np.float64)
    losses: NDArray[np.float64] = values * signs
    return losses


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis of the unit cube in which hypervolume is taken: 0 is the worst value, 1 the best.

    Attributes:
        objective: What is measured along it.
        worst: Value at 0. Anything worse counts as 0.
        best: Value at 1. Anything better counts as 1.
    """

    objective: Objective
    worst: float
    best: float

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


def hypervolume(points: Sequence[Values], axes: Sequence[Axis]) -> float:
    """Return the share of the unit cube that the points dominate, in [0, 1].

    The axes do not move while a search runs, so the figure of one trial can be compared with that of
    another, and with that of another search over the same space. Points with NaN are left out.
    Computed by moocore (Fonseca, Paquete and López-Ibáñez, "An Improved Dimension-Sweep Algorithm for
    the Hypervolume Indicator", 2006).
    """
    usable = [p for p in points if all(math.isfinite(p[a.objective.name]) for a in axes)]
    if not usable:
        return 0.0
    losses = np.array(
        [[1.0 - axis.position(point[axis.objective.name]) for axis in axes] for point in usable]
    )
    return float(moocore.hypervolume(losses, ref=np.ones(len(axes))))


def contributions(points: Sequence[Values], axes: Sequence[Axis]) -> list[float]:
    """Return what each point adds to the hypervolume of the others; 0 for one that others cover or equal.

    Points that others dominate count for nothing. Computed by moocore (Guerreiro and Fonseca, "Computing and
    Updating Hypervolume Contributions in up to Four Dimensions", 2018).
    """
    if not points:
        return []
    losses = [[1.0 - axis.position(point[axis.objective.name]) for axis in axes] for point in points]
    return [float(share) for share in moocore.hv_contributions(losses, ref=np.ones(len(axes)))]


def knee(points: Sequence[Values], axes: Sequence[Axis]) -> int:
    """Return the index of the point closest to the best corner of the unit cube (Euclidean).

    The "minimum distance to the utopian point" rule; the axes' scaling decides what counts as close.

    Raises:
        ValueError: There are no points.
    """
    if not points:
        raise ValueError("An empty front has no knee point.")
    distances = [
        math.dist([axis.position(point[axis.objective.name]) for axis in axes], [1.0] * len(axes))
        for point in points
    ]
    return int(np.argmin(distances))
