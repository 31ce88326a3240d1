"""Multi-objective successive halving: which candidates of a search are trained on.

What a candidate costs is exact before training; its metric alone is uncertain. What whole trainings like it,
in costs and in loss, gained after a rung says what a candidate there may reach: it goes on only while it can
be hoped to become better than everyone who costs no more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from autopeft.core.evaluation import VALIDATION_LOSS, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis, contributions, non_dominated
from autopeft.optimization.learning_curve_forecast import Forecast

_LOSS = Objective(name=VALIDATION_LOSS, direction="minimize", unit="score")


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
        values: What it costs, and its scores and validation loss there.
        waits: Whether it is paused there.
        expected: The metric it reached beyond the rung, or is expected to reach.
        noise: Of what is expected; None where it is not known.
        at_trivial: Whether its metric there was no better than that of always predicting the majority.
    """

    record: TrialRecord
    values: Mapping[str, float]
    waits: bool
    expected: float
    noise: float | None
    at_trivial: bool


@dataclass(frozen=True)
class _Threshold:
    """What someone costs, and reached in a whole training, or is expected to reach."""

    costs: Mapping[str, float]
    score: float
    whole: bool


def _is_whole(record: TrialRecord) -> bool:
    return record.evaluation.status == "complete" and record.duplicate_of is None


def _layers(points: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> Iterator[list[int]]:
    """Yield the places of points by non-dominated sorting: who is beaten by nobody, then without these."""
    left = list(range(len(points)))
    while left:
        flags = non_dominated([points[index] for index in left], objectives)
        yield [index for index, flag in zip(left, flags, strict=True) if flag]
        left = [index for index, flag in zip(left, flags, strict=True) if not flag]


class AshaPromoter:
    """Decides, from the finished trials alone, which paused one goes on next.

    Args:
        halving: The rule's settings.
        steps: Optimizer steps of every rung, the whole training last.
        objectives: The search's; those that only a whole training tells are left out.
        axes: The fixed axes of the hypervolume; they break ties, and the metric's has the majority's score.
        monitor: Metric of which the best validation counts.
        references: Names of the reference points that go on whatever a rung says of them.
    """

    def __init__(
        self,
        halving: SuccessiveHalving,
        steps: Sequence[int],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        monitor: str,
        references: Collection[str] = (),
    ) -> None:
        self.halving = halving
        self.steps = tuple(steps)
        self.monitor = monitor
        self._references = frozenset(references)
        self.objectives = [one for one in objectives if one.is_metric or one.before_training]
        self._costs = [one.name for one in self.objectives if not one.is_metric]
        self._axes = axes
        self._trivial_score = next(axis.worst for axis in axes if axis.objective.name == monitor)
        self._forecast = partial(Forecast, objectives=objectives, axes=axes, monitor=monitor)
        self._last = self._forecast(())

    def forecast(self, records: Sequence[TrialRecord]) -> Forecast:
        """Return what the whole trainings of a search tell of its paused ones."""
        whole = [one.evaluation for one in sorted(filter(_is_whole, records), key=lambda one: one.number)]
        if self._last.whole != tuple(whole):  # it has read their curves, once
            self._last = self._forecast(whole)
        return self._last

    def next(self, records: Sequence[TrialRecord]) -> tuple[TrialRecord, int] | None:
        """Return the trial to train on and the rung it goes to; None where a new one is due.

        The highest rung comes first, as in ASHA: what is nearly done is worth most. The space's reference
        points go on first: whole trainings of the best alone would not tell what others gain after a rung.
        """
        for rung in reversed(range(len(self.steps) - 1)):
            candidates = self._at(rung, records)
            waiting = [one for one in candidates if one.waits]
            chosen = next((one for one in waiting if one.record.baseline in self._references), None)
            if waiting and chosen is None:
                chosen = self._choose(candidates, waiting, records)
            if chosen is not None:
                return chosen.record, rung + 1
        return None

    def _at(self, rung: int, records: Sequence[TrialRecord]) -> list[_Candidate]:
        """Return everyone who has reached a rung, with the scores they had there."""
        forecast = self.forecast(records)
        found = []
        for record in records:
            if record.duplicate_of is None and record.evaluation.status in ("complete", "paused"):
                scores = forecast.scores_at(record.evaluation, self.steps[rung])
                if scores is not None:
                    found.append(self._candidate(record, scores, self.steps[rung], forecast))
        return found

    def _candidate(
        self, record: TrialRecord, scores: Mapping[str, float], step: int, forecast: Forecast
    ) -> _Candidate:
        evaluation = record.evaluation
        values = {**{name: evaluation.values[name] for name in self._costs}, **scores}
        values[VALIDATION_LOSS] = forecast.loss_at(evaluation, step)
        waits = evaluation.status == "paused" and evaluation.cost.steps == step
        expected, noise = evaluation.values[self.monitor], None
        if waits:
            expected, noise = forecast.beyond(evaluation, step, scores[self.monitor])
        at_trivial = scores[self.monitor] <= self._trivial_score
        return _Candidate(record, values, waits, expected, noise, at_trivial)

    def _choose(
        self,
        candidates: Sequence[_Candidate],
        waiting: Sequence[_Candidate],
        records: Sequence[TrialRecord],
    ) -> _Candidate | None:
        begun = [one for one in candidates if not one.at_trivial]
        others = [one for one in candidates if one.at_trivial]
        best = self._by_metric(begun)
        best += self._by_loss(others)[: self._quota(others, least=0 if begun else 1)]
        bars = [_Threshold(one.values, one.expected, whole=False) for one in waiting if not one.at_trivial]
        for record in filter(_is_whole, records):
            values = record.evaluation.values
            bars.append(_Threshold(values, values[self.monitor], whole=True))
        return next((one for one in best if one.waits and not self._is_stopped(one, bars)), None)

    def _quota(self, candidates: Sequence[_Candidate], *, least: int) -> int:
        return max(least, math.floor(len(candidates) / self.halving.reduction_factor))

    def _by_metric(self, begun: Sequence[_Candidate]) -> list[_Candidate]:
        """Return the best of those whose metric has begun to rise."""
        quota = self._quota(begun, least=1)
        waiting = [one for one in begun if one.waits]
        if len(waiting) > 1 and len({one.values[self.monitor] for one in waiting}) == 1:
            # The metric does not tell them apart: by costs alone none but the cheapest would go on.
            return self._by_loss(begun)[:quota]
        points = [{**one.values, self.monitor: one.expected} for one in begun]
        return [begun[index] for index in self._best(points, quota)]

    def _by_loss(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Sort candidates by dominance in loss and costs, within a layer by loss; those without one last."""
        objectives = [_LOSS, *(one for one in self.objectives if not one.is_metric)]
        known = [one for one in candidates if math.isfinite(one.values[VALIDATION_LOSS])]
        rest = [one for one in candidates if not math.isfinite(one.values[VALIDATION_LOSS])]
        known.sort(key=lambda one: one.values[VALIDATION_LOSS])
        layers = _layers([one.values for one in known], objectives)
        return [known[index] for layer in layers for index in layer] + rest

    def _best(self, points: Sequence[Mapping[str, float]], count: int) -> list[int]:
        """Return the first points by non-dominated sorting; a layer's by what they add to the hypervolume."""
        order: list[int] = []
        for layer in _layers(points, self.objectives):
            shares = contributions([points[index] for index in layer], self._axes)
            order += [index for _, index in sorted(zip(shares, layer, strict=True), key=lambda one: -one[0])]
            if len(order) >= count:  # layers further down are not looked at
                break
        return order[:count]

    def _is_stopped(self, one: _Candidate, bars: Sequence[_Threshold]) -> bool:
        """Whether someone who costs no more is better than this one can be hoped to become.

        One at the majority's score may become anything, as its metric has told nothing yet: what stops it is
        a whole training as good as any.
        """
        rivals = [bar for bar in bars if all(one.values[name] >= bar.costs[name] for name in self._costs)]
        if one.at_trivial:
            best = max((bar.score for bar in bars if bar.whole), default=math.inf)
            return any(bar.whole and bar.score == best > self._trivial_score for bar in rivals)
        noise = one.noise
        hoped = one.expected + (noise or 0.0)
        for bar in rivals:
            is_dearer = any(one.values[name] > bar.costs[name] for name in self._costs)
            if bar.whole and (noise is None or (noise == 0 and is_dearer)):
                continue  # nobody has gained, or all alike: what dearer ones gain is not known
            if hoped < bar.score or (bar.whole and hoped == bar.score):
                return True
        return False
