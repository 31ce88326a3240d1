"""Multi-objective successive halving: which trials of a search are trained on.

What a trial costs is exact before training; its metric alone is uncertain. What whole trainings like it, in
costs and in loss, gained after a rung says what a trial there may reach: it goes on only while it can be
hoped to become better than every trial that costs no more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopeft.core.errors import check_numbers
from autopeft.core.evaluation import VALIDATION_LOSS, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis, contributions, front_records, non_dominated, non_dominated_sort
from autopeft.optimization.learning_curve_forecast import Forecast

_LOSS = Objective(name=VALIDATION_LOSS, direction="minimize", unit="nats")


@dataclass(frozen=True, kw_only=True)
class SuccessiveHalving:
    """Train every candidate to the first rung, and the most promising on, one rung at a time.

    Asynchronous promotion as in Li et al., "A System for Massively Parallel Hyperparameter Tuning" (ASHA,
    2020), with the non-dominated sorting of Schmucker et al., "Multi-objective Asynchronous Successive
    Halving" (2021). Costs are taken exactly, the metric with the noise that a rung has shown.

    Attributes:
        rungs: Shares of the training, in (0, 1), after which candidates pause.
        reduction_factor: One of so many candidates at a rung goes on.

    Raises:
        ValueError: A rung is not a share, they do not increase, or the factor is not above 1.
    """

    # A third goes on after a third: Li et al., "Hyperband", 2018, advise a factor of 3 or 4. One rung alone
    # was chosen on MiniLM, whose trainings have some 100 steps (questions, spam).
    rungs: Sequence[float] = (1 / 3,)
    reduction_factor: float = 3.0

    def __post_init__(self) -> None:
        shares = (self.rungs,) if isinstance(self.rungs, int | float) else tuple(self.rungs)
        if not shares or not all(0 < share < 1 for share in shares) or sorted({*shares}) != [*shares]:
            raise ValueError(f"rungs are increasing shares of the training in (0, 1), got {self.rungs!r}.")
        object.__setattr__(self, "rungs", shares)
        check_numbers(above=1, reduction_factor=self.reduction_factor)

    def describe(self) -> str:
        """Say in a line what goes on."""
        shares = ", ".join(f"{share:.0%}" for share in self.rungs)
        return f"one in {self.reduction_factor:g} goes on after {shares} of it"


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A trial at a rung."""

    record: TrialRecord
    values: Mapping[str, float]  # its costs, and its scores and validation loss there
    is_paused: bool  # it has not been trained beyond the rung; it may be running
    waits: bool  # it is paused there and not running
    expected: float  # the metric that it reached beyond the rung, or is expected to reach
    noise: float | None  # of what is expected; None where it is not known
    at_trivial: bool  # its metric there was no better than that of a model that learnt nothing

    @property
    def loss(self) -> float:
        """Validation loss at the rung; infinity where it is not known."""
        return self.values[VALIDATION_LOSS]


class _Thresholds(NamedTuple):
    """What trials cost, and reached in a whole training, or are expected to reach; a row each."""

    costs: NDArray[np.float64]
    scores: NDArray[np.float64]  # more is better
    are_whole: NDArray[np.bool_]


def _is_whole(record: TrialRecord) -> bool:
    return record.evaluation.status == "complete" and record.duplicate_of is None


class AshaPromoter:
    """Decides, from the records alone, which paused trial goes on next.

    `steps` has the optimizer steps of every rung, the whole training last; the axes break ties, and that of
    the metric `monitor` has the trivial score. The baselines in `references` go on whatever a rung says.
    """

    def __init__(
        self,
        halving: SuccessiveHalving,
        steps: Sequence[int],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        monitor: Objective,
        references: Collection[str] = (),
    ) -> None:
        self.halving = halving
        self.steps = tuple(steps)
        self.monitor = monitor
        self._references = frozenset(references)
        self.objectives = [
            objective
            for objective in objectives
            if objective.before_training or (objective.is_metric and not objective.at_end)
        ]
        self._costs = [objective.name for objective in self.objectives if not objective.is_metric]
        self._axes = [axis for axis in axes if axis.objective in self.objectives]
        self._trivial_score = next(axis.worst for axis in axes if axis.objective == monitor)
        self._forecast = partial(Forecast, objectives=objectives, axes=axes, monitor=monitor)
        self._last = self._forecast(())
        # By rung and number: in a large search, reading every curve again for each job takes longest.
        self._seen: dict[tuple[int, int], _Candidate] = {}

    def forecast(self, records: Sequence[TrialRecord]) -> Forecast:
        """Return what the whole trainings of a search tell of its paused trials."""
        whole = sorted(filter(_is_whole, records), key=lambda record: record.number)
        evaluations = tuple(record.evaluation for record in whole)
        if self._last.whole != evaluations:  # it has read their curves, once
            self._last = self._forecast(evaluations)
            self._seen = {place: seen for place, seen in self._seen.items() if not seen.is_paused}
        return self._last

    def next(
        self, records: Sequence[TrialRecord], running: Collection[int] = ()
    ) -> tuple[TrialRecord, int] | None:
        """Return the trial to train on and the rung it goes to; None where a new one is due.

        The highest rung comes first, as in ASHA: trials close to completion are finished first. The space's
        baselines go on first: whole trainings of the best alone would not tell what others gain after a rung.
        Those that are running are not trained on twice.
        """
        for rung in reversed(range(len(self.steps) - 1)):
            candidates = self._at(rung, records, running)
            waiting = [candidate for candidate in candidates if candidate.waits]
            references = (known for known in waiting if known.record.baseline in self._references)
            if waiting and (chosen := next(references, None) or self._choose(candidates, records)):
                return chosen.record, rung + 1
        return None

    def promising(
        self, records: Sequence[TrialRecord], running: Collection[int] = ()
    ) -> list[tuple[TrialRecord, int]]:
        """Return the paused trials that are expected to come onto the front, and the rungs they go to.

        These are what a search that ends would leave behind: the reduction factor let others go first. What
        is expected to add most to the hypervolume comes first.
        """
        paused = [
            (candidate, rung + 1)
            for rung in range(len(self.steps) - 1)
            for candidate in self._at(rung, records, running)
            if candidate.waits and not candidate.at_trivial
        ]
        expected = [{**candidate.values, self.monitor.name: candidate.expected} for candidate, _ in paused]
        members = [record.evaluation.values for record in front_records(records, self.objectives)]
        points = [*expected, *members]
        is_on_front = non_dominated(points, self.objectives)
        shares = contributions(points, self._axes)
        order = [place for place in range(len(paused)) if is_on_front[place] and shares[place] > 0]
        order.sort(key=lambda place: (-shares[place], paused[place][0].record.number))
        return [(paused[place][0].record, paused[place][1]) for place in order]

    def _at(self, rung: int, records: Sequence[TrialRecord], running: Collection[int]) -> list[_Candidate]:
        """Return every trial that has reached a rung, with the scores it had there."""
        forecast, found = self.forecast(records), []
        for record in records:
            candidate = self._seen.get((rung, record.number))
            if candidate is None or candidate.record is not record:
                candidate = self._candidate(record, self.steps[rung], forecast)
                if candidate is None:
                    continue
                self._seen[rung, record.number] = candidate
            waits = candidate.is_paused and record.number not in running
            found.append(candidate if waits == candidate.waits else replace(candidate, waits=waits))
        return found

    def _candidate(self, record: TrialRecord, step: int, forecast: Forecast) -> _Candidate | None:
        """Return a trial at a rung; None where it has not reached it, or is none of its own."""
        evaluation = record.evaluation
        if record.duplicate_of is not None or evaluation.status not in ("complete", "paused"):
            return None
        scores = forecast.scores_at(evaluation, step)
        if scores is None:
            return None
        costs = {name: evaluation.values[name] for name in self._costs}
        is_paused = evaluation.status == "paused" and evaluation.cost.steps == step
        expected, noise = evaluation.values[self.monitor.name], None
        if is_paused:
            expected, noise = forecast.beyond(evaluation, step, scores[self.monitor.name])
        return _Candidate(
            record=record,
            values={**costs, **scores, VALIDATION_LOSS: forecast.loss_at(evaluation, step)},
            is_paused=is_paused,
            waits=is_paused,
            expected=expected,
            noise=noise,
            at_trivial=not self.monitor.is_better(scores[self.monitor.name], self._trivial_score),
        )

    def _choose(self, candidates: Sequence[_Candidate], records: Sequence[TrialRecord]) -> _Candidate | None:
        begun = [candidate for candidate in candidates if not candidate.at_trivial]
        others = [candidate for candidate in candidates if candidate.at_trivial]
        best = self._by_metric(begun)[: self._quota(begun, least=1)]
        best += self._by_loss(others)[: self._quota(others, least=0 if begun else 1)]
        thresholds = self._thresholds(begun, records)
        going = (
            candidate for candidate in best if candidate.waits and not self._is_stopped(candidate, thresholds)
        )
        return next(going, None)

    def _thresholds(self, begun: Sequence[_Candidate], records: Sequence[TrialRecord]) -> _Thresholds:
        paused = [candidate for candidate in begun if candidate.is_paused]
        whole = [record.evaluation.values for record in filter(_is_whole, records)]
        values = [*(candidate.values for candidate in paused), *whole]
        costs = np.array([[known[name] for name in self._costs] for known in values])
        scores = [candidate.expected for candidate in paused] + [known[self.monitor.name] for known in whole]
        return _Thresholds(
            costs=costs.reshape(len(values), len(self._costs)),
            scores=self.monitor.sign * np.array(scores),
            are_whole=np.arange(len(values)) >= len(paused),
        )

    def _quota(self, candidates: Sequence[_Candidate], *, least: int) -> int:
        return max(least, math.floor(len(candidates) / self.halving.reduction_factor))

    def _by_metric(self, begun: Sequence[_Candidate]) -> list[_Candidate]:
        """Sort those whose metric has begun to rise by dominance, within a layer by their hypervolume."""
        waiting = {candidate.values[self.monitor.name] for candidate in begun if candidate.waits}
        if len(waiting) == 1 < sum(candidate.waits for candidate in begun):
            # The metric does not tell them apart: by costs alone none but the cheapest would go on.
            return self._by_loss(begun)
        points = [{**candidate.values, self.monitor.name: candidate.expected} for candidate in begun]
        order: list[_Candidate] = []
        for layer in non_dominated_sort(points, self.objectives):
            shares = contributions([points[index] for index in layer], self._axes)
            ranked = sorted(zip(shares, layer, strict=True), key=lambda share: -share[0])
            order += [begun[index] for _, index in ranked]
        return order

    def _by_loss(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Sort candidates by dominance in loss and costs, within a layer by loss; those without one last."""
        objectives = [_LOSS, *(objective for objective in self.objectives if not objective.is_metric)]
        known = [candidate for candidate in candidates if math.isfinite(candidate.loss)]
        known.sort(key=lambda candidate: candidate.loss)
        layers = non_dominated_sort([candidate.values for candidate in known], objectives)
        rest = [candidate for candidate in candidates if not math.isfinite(candidate.loss)]
        return [known[index] for layer in layers for index in layer] + rest

    def _is_stopped(self, candidate: _Candidate, thresholds: _Thresholds) -> bool:
        """Whether a trial that costs no more already beats this one's optimistic estimate.

        At the trivial score the metric says nothing; only a complete trial that is as good as any stops it.
        """
        costs = np.array([candidate.values[name] for name in self._costs])
        cost_no_more = (thresholds.costs <= costs).all(axis=1)
        scores, are_whole = thresholds.scores, thresholds.are_whole
        if candidate.at_trivial:
            trivial = self.monitor.sign * self._trivial_score
            best = scores[are_whole].max(initial=trivial)
            return bool(best != trivial and (cost_no_more & are_whole & (scores == best)).any())
        # One deviation: of trials like it 16 % gain more.
        hoped = self.monitor.sign * candidate.expected + (candidate.noise or 0.0)
        beat_it = cost_no_more & ((scores > hoped) | (are_whole & (scores == hoped)))
        if candidate.noise is None:  # no spread of gains is known yet
            beat_it &= ~are_whole
        elif candidate.noise == 0:
            beat_it &= ~are_whole | (thresholds.costs == costs).all(axis=1)
        return bool(beat_it.any())
