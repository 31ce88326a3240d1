"""What a trial that is not trained to the end may reach: what whole trainings like it gained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopeft.core.evaluation import VALIDATION_LOSS, Evaluation
from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis

_FEWEST_FOR_NOISE = 3  # gains: the deviation of two says next to nothing
# Whole trainings, whose gains after a rung are taken for a candidate's; chosen on MiniLM alone (questions,
# spam).
_NEAREST = 5
_ALIKE = 1e-9  # what differs by less differs by rounding alone


class _Gains(NamedTuple):
    """What whole trainings gained after a step, and where they were then."""

    gains: Sequence[float]  # of the metric, one a training
    # (trainings, axes + 1): where their costs lie on the axes, and the logarithm of their loss
    places: NDArray[np.float64]
    spread: NDArray[np.float64]  # standard deviation of each column; infinite where nothing differs
    worst_loss: float  # logarithm of the highest loss known


class Forecast:
    """Predicts a paused trial's final metric from completed trials of similar cost and loss.

    Completed trials are sorted by number. Costs are compared on the fixed axes of the hypervolume; of the
    metric `monitor` the best validation counts.
    """

    def __init__(
        self,
        whole: Sequence[Evaluation],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        monitor: Objective,
    ) -> None:
        self.whole = tuple(whole)
        self.monitor = monitor
        self._objectives = tuple(objectives)
        self._scores = [each.name for each in objectives if each.is_metric and not each.at_end]
        self._worst = {axis.objective.name: axis.worst for axis in axes}
        self._axes = [
            axis for axis in axes if axis.objective.before_training and not axis.objective.is_metric
        ]
        self._known: dict[tuple[int, bool], _Gains] = {}

    def scores_at(self, evaluation: Evaluation, step: int) -> dict[str, float] | None:
        """Return the scores of the best validation up to a step; None before it was reached."""
        if evaluation.status == "paused" and evaluation.cost.steps < step:
            return None
        known: dict[int, dict[str, float]] = {}
        for point in evaluation.curves:
            if point.step <= step:
                known.setdefault(point.step, {})[point.metric] = point.value
        validations = [scores for scores in known.values() if all(name in scores for name in self._scores)]
        if not validations:
            return None
        best = max(validations, key=lambda scores: self.monitor.sign * scores[self.monitor.name])
        return {name: best[name] for name in self._scores}

    def loss_at(self, evaluation: Evaluation, step: int) -> float:
        """Return the loss of the latest validation up to a step; infinity where none is known."""
        losses = (point for point in reversed(evaluation.curves) if point.metric == VALIDATION_LOSS)
        return next((point.value for point in losses if point.step <= step), math.inf)

    def gains(self, evaluation: Evaluation, step: int) -> list[float]:
        """Return what whole trainings gained after a step: those that were most like this one there.

        A gain is up to the mean over several trainings: what another seed would give. Likeness is in the
        costs and in the validation loss at that step, each by how much it differs between the whole
        trainings; a loss that is not known is the highest that is. Trainings that inherit their
        weights and others are never alike.
        """
        kind = step, evaluation.warm_start
        if kind not in self._known:
            self._known[kind] = self._read(*kind)
        known = self._known[kind]
        if not known.gains:
            return []
        place = np.array(self._place(evaluation, step))
        if not math.isfinite(place[-1]):
            place[-1] = known.worst_loss
        distances = np.square((known.places - place) / known.spread).sum(axis=1)
        return [known.gains[index] for index in np.argsort(distances, kind="stable")[:_NEAREST]]

    def _read(self, step: int, warm_start: bool) -> _Gains:
        gains, found = [], []
        for evaluation in self.whole:
            scores = self.scores_at(evaluation, step) if evaluation.warm_start == warm_start else None
            if scores is not None:
                gains.append(evaluation.values[self.monitor.name] - scores[self.monitor.name])
                found.append(self._place(evaluation, step))
        if not gains:
            return _Gains((), np.empty((0, 0)), np.empty(0), 0.0)
        places = np.array(found)
        is_known = np.isfinite(places[:, -1])
        worst_loss = float(places[is_known, -1].max()) if is_known.any() else 0.0
        places[~is_known, -1] = worst_loss
        spread = np.where(np.ptp(places, axis=0) > _ALIKE, places.std(axis=0), np.inf)
        return _Gains(gains, places, spread, worst_loss)

    def _place(self, evaluation: Evaluation, step: int) -> list[float]:
        """Return where the costs lie on the axes of the hypervolume, and the logarithm of a step's loss."""
        places = [axis.position(evaluation.values[axis.objective.name]) for axis in self._axes]
        return [*places, math.log(max(self.loss_at(evaluation, step), _ALIKE))]

    def beyond(self, evaluation: Evaluation, step: int, score: float) -> tuple[float, float | None]:
        """Return the metric that a candidate which paused with a score is expected to reach, and its noise.

        It is the score itself, and None, where too few have gone on to tell.
        """
        gains = self.gains(evaluation, step)
        if len(gains) < _FEWEST_FOR_NOISE:
            return score, None
        return score + statistics.median(gains), statistics.stdev(gains)

    def values(self, evaluation: Evaluation) -> list[float]:
        """Return the objectives that a paused trial is expected to reach, for the sampler to learn from.

        The median of what whole trainings like it gained from that step on is added to its metric. What is
        only measured at the end is expected to be the median of the whole trainings.
        """
        gains = self.gains(evaluation, evaluation.cost.steps)
        gain = statistics.median(gains) if gains else 0.0
        values: Mapping[str, float] = {
            **self._at_end(),
            **evaluation.values,
            self.monitor.name: evaluation.values[self.monitor.name] + gain,
            "training_seconds": evaluation.values["training_seconds"] / evaluation.fidelity,
        }
        return [values[objective.name] for objective in self._objectives]

    def _at_end(self) -> dict[str, float]:
        found = {}
        for name in (objective.name for objective in self._objectives if objective.at_end):
            known = [evaluation.values[name] for evaluation in self.whole]
            found[name] = statistics.median(known) if known else self._worst[name]
        return found
