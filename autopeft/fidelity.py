"""Multi-objective successive halving: which candidates of a search are trained on.

What a candidate costs is exact before training; its metric alone is uncertain. So a candidate is compared
with the others at the same rung, and goes on only while nobody who costs no more is clearly better, and
while it can be hoped to become better than every whole training that costs no more.
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
    """A score that those must pass who cost as much, or more if `for_dearer`; `passes_at`: or reach."""

    costs: Mapping[str, float]
    score: float
    passes_at: bool
    for_dearer: bool = True


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
                chosen = self._choose(candidates, self._bars(rung, candidates, records))
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

    def _choose(self, candidates: Sequence[_Candidate], bars: Sequence[_Bar]) -> _Candidate | None:
        quota = max(1, math.floor(len(candidates) / self.halving.reduction_factor))
        waiting = [one for one in candidates if one.waits]
        if len(waiting) > 1 and len({one.values[self.monitor] for one in waiting}) == 1:
            # The rung does not tell them apart: sorting by costs alone would let none but the cheapest go on.
            best = waiting[: max(0, quota - (len(candidates) - len(waiting)))]
        else:
            best = [candidates[index] for index in self._best([one.values for one in candidates], quota)]
        for one in best:
            if one.waits and not any(self._stops(bar, one) for bar in bars):
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
        """Return what a candidate must reach at a rung, as candidates there and whole trainings set it."""
        noise = self.noise(rung, records)
        bars = [_Bar(one.values, one.values[self.monitor] - noise, passes_at=True) for one in candidates]
        gains = self._gains(self.steps[rung], records)
        if len(gains) < _FEWEST_FOR_NOISE:
            return bars
        hoped = statistics.median(gains) + noise
        for record in records:
            values = record.evaluation.values
            if record.evaluation.status == "complete" and record.duplicate_of is None:
                # Where all have gained alike, as nothing at all, what dearer ones would gain is not known.
                score = values[self.monitor] - hoped
                bars.append(_Bar(values, score, passes_at=False, for_dearer=noise > 0))
        return bars

    def _stops(self, bar: _Bar, one: _Candidate) -> bool:
        """Whether a bar's setter costs no more, and a candidate does not pass it."""
        differences = [one.values[name] - bar.costs[name] for name in self._costs]
        if any(one < 0 for one in differences) or (any(differences) and not bar.for_dearer):
            return False
        score = one.values[self.monitor]
        return score < bar.score or (score == bar.score and not bar.passes_at)

    def noise(self, rung: int, records: Sequence[TrialRecord]) -> float:
        """Return the standard deviation of what whole trainings gained after a rung; 0 where unknown."""
        gains = self._gains(self.steps[rung], records)
        return statistics.stdev(gains) if len(gains) >= _FEWEST_FOR_NOISE else 0.0

    def _gains(self, step: int, records: Sequence[TrialRecord]) -> list[float]:
        gains = []
        for record in records:
            if record.evaluation.status == "complete" and record.duplicate_of is None:
                scores = self.scores_at(record.evaluation, step)
                if scores is not None:
                    gains.append(record.evaluation.values[self.monitor] - scores[self.monitor])
        return gains

    def expected(self, evaluation: Evaluation, records: Sequence[TrialRecord]) -> list[float]:
        """Return the objectives that a paused trial is expected to reach, for the sampler to learn from.

        The median of what whole trainings gained from that step on is added to the metric it has.
        """
        gains = self._gains(evaluation.cost.steps, records)
        gain = statistics.median(gains) if gains else 0.0
        values = {**evaluation.values, self.monitor: evaluation.values[self.monitor] + gain}
        values["training_seconds"] /= evaluation.fidelity
        return [values[objective.name] for objective in self._all_objectives]
