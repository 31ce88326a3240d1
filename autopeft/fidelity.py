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
    """A trial at a rung: what it costs, and its scores there."""

    record: TrialRecord
    values: Mapping[str, float]
    waits: bool


@dataclass(frozen=True)
class _Bar:
    """What someone costs, and reached in a whole training, or is expected to reach."""

    costs: Mapping[str, float]
    score: float
    whole: bool


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
                chosen = self._choose(rung, candidates, records)
            if chosen is not None:
                return chosen.record, rung + 1
        return None

    def _at(self, rung: int, records: Sequence[TrialRecord]) -> list[_Candidate]:
        """Return everyone who has reached a rung, with the scores they had there."""
        step = self.steps[rung]
        found = []
        for record in records:
            evaluation = record.evaluation
            if record.duplicate_of is not None or evaluation.status not in ("complete", "paused"):
                continue
            scores = self.scores_at(evaluation, step)
            if scores is not None:
                costs = {name: evaluation.values[name] for name in self._costs}
                waits = evaluation.status == "paused" and evaluation.cost.steps == step
                found.append(_Candidate(record, {**costs, **scores}, waits))
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

    def _choose(
        self, rung: int, candidates: Sequence[_Candidate], records: Sequence[TrialRecord]
    ) -> _Candidate | None:
        quota = max(1, math.floor(len(candidates) / self.halving.reduction_factor))
        waiting = [one for one in candidates if one.waits]
        if len(waiting) > 1 and len({one.values[self.monitor] for one in waiting}) == 1:
            # The rung does not tell them apart: sorting by costs alone would let none but the cheapest go on.
            best = waiting[: max(0, quota - (len(candidates) - len(waiting)))]
        else:
            points = [{**one.values, self.monitor: self._reach(rung, one, records)} for one in candidates]
            best = [candidates[index] for index in self._best(points, quota)]
        bars = self._bars(rung, candidates, records)
        for one in best:
            if one.waits and not self._is_stopped(rung, one, bars, records):
                return one
        return None

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

    def _bars(
        self, rung: int, candidates: Sequence[_Candidate], records: Sequence[TrialRecord]
    ) -> list[_Bar]:
        """Return what others reach: those who wait at a rung as is expected, whole trainings as they did."""
        waiting = [one for one in candidates if one.waits]
        bars = [_Bar(one.values, self._reach(rung, one, records), whole=False) for one in waiting]
        wholes = (one.evaluation.values for one in records if _is_whole(one))
        return bars + [_Bar(values, values[self.monitor], whole=True) for values in wholes]

    def _reach(self, rung: int, one: _Candidate, records: Sequence[TrialRecord]) -> float:
        """Return the metric that a candidate is expected to reach, or has reached beyond the rung."""
        if not one.waits:
            return one.record.evaluation.values[self.monitor]
        return one.values[self.monitor] + self._gain(rung, one, records)[0]

    def _gain(self, rung: int, one: _Candidate, records: Sequence[TrialRecord]) -> tuple[float, float | None]:
        """Return what a candidate is expected to gain after a rung, and the noise; None where unknown."""
        gains = self.gains(one.record.evaluation, self.steps[rung], records)
        if len(gains) < _FEWEST_FOR_NOISE:
            return 0.0, None
        return statistics.median(gains), statistics.stdev(gains)

    def _is_stopped(
        self, rung: int, one: _Candidate, bars: Sequence[_Bar], records: Sequence[TrialRecord]
    ) -> bool:
        """Whether someone who costs no more is better than this one can be hoped to become."""
        gain, noise = self._gain(rung, one, records)
        hoped = one.values[self.monitor] + gain + (noise or 0.0)
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
        found = []
        for record in records:
            if _is_whole(record):
                scores = self.scores_at(record.evaluation, step)
                if scores is not None:
                    gain = record.evaluation.values[self.monitor] - scores[self.monitor]
                    found.append((self._distance(evaluation, record.evaluation), record.number, gain))
        return [gain for *_, gain in sorted(found)[:_NEAREST]]

    def _distance(self, first: Evaluation, second: Evaluation) -> float:
        """Return the largest difference in a cost, on the axes of the hypervolume."""
        names = [axis.objective.name for axis in self._axes]
        differences = [
            abs(axis.position(first.values[name]) - axis.position(second.values[name]))
            for name, axis in zip(names, self._axes, strict=True)
            if name in self._costs
        ]
        return max(differences, default=0.0)

    def expected(self, evaluation: Evaluation, records: Sequence[TrialRecord]) -> list[float]:
        """Return the objectives that a paused trial is expected to reach, for the sampler to learn from.

        The median of what whole trainings of like costs gained from that step on is added to its metric.
        """
        gains = self.gains(evaluation, evaluation.cost.steps, records)
        gain = statistics.median(gains) if gains else 0.0
        values = {**evaluation.values, self.monitor: evaluation.values[self.monitor] + gain}
        values["training_seconds"] /= evaluation.fidelity
        return [values[objective.name] for objective in self._all_objectives]
