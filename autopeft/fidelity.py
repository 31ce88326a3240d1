"""Multi-objective successive halving: which candidates of a search are trained on.

What a candidate costs is exact before training; its metric alone is uncertain. What whole trainings of like
costs gained after a rung says what a candidate there may reach: it goes on only while it can be hoped to
become better than everyone who costs no more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_

import numpy as np
from numpy.typing import NDArray

from autopeft.evaluation import Evaluation, TrialRecord
from autopeft.objectives import Objective
from autopeft.pareto import Axis, contributions, non_dominated

_FEWEST_FOR_NOISE = 3
_NEAREST = 5  # whole trainings, whose gains after a rung are taken for a candidate's


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Train every candidate to the first rung, and the most promising ones on, one rung at a time.

    Asynchronous promotion as in Li et al., "A System for Massively Parallel Hyperparameter Tuning" (ASHA,
    2020), with the non-dominated sorting of Schmucker et al., "Multi-objective Asynchronous Successive
    Halving" (2021). Costs are taken exactly, the metric with the noise that a rung has shown.

    Attributes:
        rungs: Shares of the training, in (0, 1), after which candidates pause.
        reduction_factor: One of so many candidates at a rung goes on.

    Raises:
        ValueError: A rung is not a share, they do not increase, or the factor is not above 1.
    """

    rungs: Sequence[float] = (1 / 3,)
    reduction_factor: float = 3.0

    def __post_init__(self) -> None:
        shares = (self.rungs,) if isinstance(self.rungs, int | float) else tuple(self.rungs)
        if not shares or not all(0 < share < 1 for share in shares) or sorted({*shares}) != [*shares]:
            raise ValueError(f"rungs are increasing shares of the training in (0, 1), got {self.rungs!r}.")
        object.__setattr__(self, "rungs", shares)
        if not (math.isfinite(self.reduction_factor) and self.reduction_factor > 1):
            raise ValueError(f"reduction_factor is a number above 1, got {self.reduction_factor!r}.")

    def describe(self) -> str:
        """Say in a line who goes on."""
        shares = ", ".join(f"{share:.0%}" for share in self.rungs)
        return f"one in {self.reduction_factor:g} goes on after {shares} of it"


@dataclass(frozen=True)
class _Candidate:
    """A trial at a rung.

    Attributes:
        record: The trial.
        values: What it costs, and its scores there.
        waits: Whether it is paused there.
        expected: The metric it reached beyond the rung, or is expected to reach.
        noise: Of what is expected; None where it is not known.
    """

    record: TrialRecord
    values: Mapping[str, float]
    waits: bool
    expected: float
    noise: float | None = None


@dataclass(frozen=True)
class _Bar:
    """What someone costs, and reached in a whole training, or is expected to reach."""

    costs: Mapping[str, float]
    score: float
    whole: bool


@dataclass(frozen=True, kw_only=True)
class _Gains:
    """What whole trainings gained after a rung, and where their costs lie."""

    evaluations: Sequence[Evaluation]
    gains: Sequence[float]
    places: NDArray[np.float64]


def _is_whole(record: TrialRecord) -> bool:
    return record.evaluation.status == "complete" and record.duplicate_of is None


class Promotion:
    """Decides, from the finished trials alone, which paused one goes on next.

    Args:
        halving: The rule's settings.
        steps: Optimizer steps of every rung, the whole training last.
        objectives: The search's; those that only a whole training tells are left out.
        axes: The fixed axes of the hypervolume; they break ties.
        monitor: Metric of which the best validation counts.
    """

    def __init__(
        self,
        halving: SuccessiveHalving,
        steps: Sequence[int],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        monitor: str,
    ) -> None:
        self.halving = halving
        self.steps = tuple(steps)
        self.monitor = monitor
        self._all_objectives = tuple(objectives)
        self.objectives = [one for one in objectives if one.unit == "score" or one.before_training]
        self._scores = [one.name for one in self.objectives if one.unit == "score"]
        self._costs = [one.name for one in self.objectives if one.unit != "score"]
        self._axes = axes
        self._known: dict[int, _Gains] = {}

    def next(self, records: Sequence[TrialRecord]) -> tuple[TrialRecord, int] | None:
        """Return the trial to train on and the rung it goes to; None where a new one is due.

        The highest rung comes first, as in ASHA: what is nearly done is worth most. The space's reference
        points always go on: whole trainings of the best alone would not tell what others gain after a rung.
        """
        for rung in reversed(range(len(self.steps) - 1)):
            candidates = self._at(rung, records)
            waiting = [one for one in candidates if one.waits]
            chosen = next((one for one in waiting if one.record.anchor is not None), None)
            if waiting and chosen is None:
                chosen = self._choose(candidates, records)
            if chosen is not None:
                return chosen.record, rung + 1
        return None

    def _at(self, rung: int, records: Sequence[TrialRecord]) -> list[_Candidate]:
        """Return everyone who has reached a rung, with the scores they had there."""
        step = self.steps[rung]
        known = self._gains_after(step, records)
        found = []
        for record in records:
            evaluation = record.evaluation
            if record.duplicate_of is not None or evaluation.status not in ("complete", "paused"):
                continue
            scores = self.scores_at(evaluation, step)
            if scores is not None:
                costs = {name: evaluation.values[name] for name in self._costs}
                waits = evaluation.status == "paused" and evaluation.cost.steps == step
                reached, noise = evaluation.values[self.monitor], None
                if waits:
                    gains = self._nearest(known, evaluation)
                    reached = scores[self.monitor]
                    if len(gains) >= _FEWEST_FOR_NOISE:
                        reached, noise = reached + statistics.median(gains), statistics.stdev(gains)
                found.append(_Candidate(record, {**costs, **scores}, waits, reached, noise))
        return found

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

    def _choose(self, candidates: Sequence[_Candidate], records: Sequence[TrialRecord]) -> _Candidate | None:
        quota = max(1, math.floor(len(candidates) / self.halving.reduction_factor))
        waiting = [one for one in candidates if one.waits]
        if len(waiting) > 1 and len({one.values[self.monitor] for one in waiting}) == 1:
            # The rung does not tell them apart: sorting by costs alone would let none but the cheapest go on.
            best = waiting[: max(0, quota - (len(candidates) - len(waiting)))]
        else:
            points = [{**one.values, self.monitor: one.expected} for one in candidates]
            best = [candidates[index] for index in self._best(points, quota)]
        bars = [_Bar(one.values, one.expected, whole=False) for one in waiting]
        for record in filter(_is_whole, records):
            values = record.evaluation.values
            bars.append(_Bar(values, values[self.monitor], whole=True))
        return next((one for one in best if one.waits and not self._is_stopped(one, bars)), None)

    def _best(self, points: Sequence[Mapping[str, float]], count: int) -> list[int]:
        """Return the first points by non-dominated sorting; a layer's by what they add to the hypervolume."""
        order: list[int] = []
        left = list(range(len(points)))
        while len(order) < count:
            flags = non_dominated([points[index] for index in left], self.objectives)
            layer = [index for index, flag in zip(left, flags, strict=True) if flag]
            shares = contributions([points[index] for index in layer], self._axes)
            order += [index for _, index in sorted(zip(shares, layer, strict=True), key=lambda one: -one[0])]
            left = [index for index in left if index not in set(layer)]
        return order[:count]

    def _is_stopped(self, one: _Candidate, bars: Sequence[_Bar]) -> bool:
        """Whether someone who costs no more is better than this one can be hoped to become."""
        noise = one.noise
        hoped = one.expected + (noise or 0.0)
        for bar in bars:
            differences = [one.values[name] - bar.costs[name] for name in self._costs]
            if any(difference < 0 for difference in differences):
                continue
            if bar.whole and noise is None:
                continue
            if bar.whole and not noise and any(differences):
                continue  # all have gained alike, as nothing at all: what dearer ones gain is not known
            if hoped < bar.score or (bar.whole and hoped == bar.score):
                return True
        return False

    def gains(self, evaluation: Evaluation, step: int, records: Sequence[TrialRecord]) -> list[float]:
        """Return what whole trainings gained after a step: those that cost most nearly what this one does.

        What is small learns less: the gains of large candidates would promise it what it cannot keep.
        """
        return self._nearest(self._gains_after(step, records), evaluation)

    def _nearest(self, known: _Gains, evaluation: Evaluation) -> list[float]:
        if not known.gains:
            return []
        distances = np.abs(known.places - self._place(evaluation)).max(axis=1, initial=0.0)
        return [known.gains[index] for index in np.argsort(distances, kind="stable")[:_NEAREST]]

    def _gains_after(self, step: int, records: Sequence[TrialRecord]) -> _Gains:
        """Return the gains of all whole trainings, by number; read again only where they are others."""
        whole = sorted(filter(_is_whole, records), key=lambda one: one.number)
        evaluations = [one.evaluation for one in whole]
        known = self._known.get(step)
        same = known is not None and len(known.evaluations) == len(evaluations)
        if known is None or not same or not all(map(is_, known.evaluations, evaluations)):
            known = self._known[step] = self._read(evaluations, step)
        return known

    def _read(self, whole: Sequence[Evaluation], step: int) -> _Gains:
        gains, places = [], []
        for one in whole:
            scores = self.scores_at(one, step)
            if scores is not None:
                gains.append(one.values[self.monitor] - scores[self.monitor])
                places.append(self._place(one))
        return _Gains(evaluations=whole, gains=gains, places=np.array(places))

    def _place(self, evaluation: Evaluation) -> list[float]:
        """Return where the costs lie on the axes of the hypervolume."""
        axes = [axis for axis in self._axes if axis.objective.name in self._costs]
        return [axis.position(evaluation.values[axis.objective.name]) for axis in axes]

    def expected(self, evaluation: Evaluation, records: Sequence[TrialRecord]) -> list[float]:
        """Return the objectives that a paused trial is expected to reach, for the sampler to learn from.

        The median of what whole trainings of like costs gained from that step on is added to its metric.
        """
        gains = self.gains(evaluation, evaluation.cost.steps, records)
        gain = statistics.median(gains) if gains else 0.0
        values = {**evaluation.values, self.monitor: evaluation.values[self.monitor] + gain}
        values["training_seconds"] /= evaluation.fidelity
        return [values[objective.name] for objective in self._all_objectives]
