"""What a candidate that is not trained to the end may reach: what whole trainings like it gained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopeft.evaluation import VALIDATION_LOSS, Evaluation
from autopeft.objectives import Objective
from autopeft.pareto import Axis

FEWEST_FOR_NOISE = 3
"""Whole trainings that tell how much what they gain after a rung differs."""
_NEAREST = 5  # whole trainings, whose gains after a rung are taken for a candidate's


@dataclass(frozen=True)
class _Gains:
    """What whole trainings gained after a step, and where their costs and their loss there lie."""

    gains: Sequence[float]
    places: NDArray[np.float64]


class Forecast:
    """What whole trainings tell of those that paused.

    Args:
        whole: The whole trainings, by number.
        objectives: The search's.
        axes: The fixed axes of the hypervolume, on which costs are near or far.
        monitor: Metric of which the best validation counts.
    """

    def __init__(
        self,
        whole: Sequence[Evaluation],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        monitor: str,
    ) -> None:
        self.whole = tuple(whole)
        self.monitor = monitor
        self._objectives = [one.name for one in objectives]
        self._scores = [one.name for one in objectives if one.unit == "score"]
        self._axes = [
            axis for axis in axes if axis.objective.before_training and axis.objective.unit != "score"
        ]
        self._known: dict[int, _Gains] = {}

    def scores_at(self, evaluation: Evaluation, step: int) -> dict[str, float] | None:
        """Return the scores of the best validation up to a step; None before it was reached."""
        if evaluation.status == "paused" and evaluation.cost.steps < step:
            return None
        known: dict[int, dict[str, float]] = {}
        for point in evaluation.curves:
            if point.step <= step:
                known.setdefault(point.step, {})[point.metric] = point.value
        validations = [one for one in known.values() if all(name in one for name in self._scores)]
        if not validations:
            return None
        best = max(validations, key=lambda one: one[self.monitor])
        return {name: best[name] for name in self._scores}

    def loss_at(self, evaluation: Evaluation, step: int) -> float:
        """Return the loss of the latest validation up to a step; infinity where none is known."""
        losses = [
            point.value
            for point in evaluation.curves
            if point.metric == VALIDATION_LOSS and point.step <= step
        ]
        return losses[-1] if losses else math.inf

    def gains(self, evaluation: Evaluation, step: int) -> list[float]:
        """Return what whole trainings gained after a step: those that were most like this one there.

        What is small learns less, and what has not begun to learn may not begin: the gains of others would
        promise it what it cannot keep. Likeness is in the costs and in the validation loss at that step,
        where all have one, each by how much it differs between the whole trainings.
        """
        if step not in self._known:
            self._known[step] = self._read(step)
        known = self._known[step]
        if not known.gains:
            return []
        with np.errstate(invalid="ignore", divide="ignore"):  # where a loss is not known, or nothing differs
            apart = (known.places - self._place(evaluation, step)) / np.std(known.places, axis=0)
        distances = np.square(apart[:, np.isfinite(apart).all(axis=0)]).sum(axis=1)
        return [known.gains[index] for index in np.argsort(distances, kind="stable")[:_NEAREST]]

    def _read(self, step: int) -> _Gains:
        gains, places = [], []
        for one in self.whole:
            scores = self.scores_at(one, step)
            if scores is not None:
                gains.append(one.values[self.monitor] - scores[self.monitor])
                places.append(self._place(one, step))
        return _Gains(gains, np.array(places))

    def _place(self, evaluation: Evaluation, step: int) -> list[float]:
        """Return where the costs lie on the axes of the hypervolume, and the loss at a step."""
        places = [axis.position(evaluation.values[axis.objective.name]) for axis in self._axes]
        return [*places, self.loss_at(evaluation, step)]

    def beyond(self, evaluation: Evaluation, step: int, score: float) -> tuple[float, float | None]:
        """Return the metric that a candidate is expected to reach, and its noise.

        Args:
            evaluation: The candidate.
            step: Where it paused.
            score: Its metric there.

        Returns:
            The score itself, and None, where too few have gone on to tell.
        """
        gains = self.gains(evaluation, step)
        if len(gains) < FEWEST_FOR_NOISE:
            return score, None
        return score + statistics.median(gains), statistics.stdev(gains)

    def values(self, evaluation: Evaluation) -> list[float]:
        """Return the objectives that a paused trial is expected to reach, for the sampler to learn from.

        The median of what whole trainings like it gained from that step on is added to its metric.
        """
        gains = self.gains(evaluation, evaluation.cost.steps)
        gain = statistics.median(gains) if gains else 0.0
        values: Mapping[str, float] = {
            **evaluation.values,
            self.monitor: evaluation.values[self.monitor] + gain,
            "training_seconds": evaluation.values["training_seconds"] / evaluation.fidelity,
        }
        return [values[name] for name in self._objectives]
