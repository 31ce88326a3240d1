"""Training what is on the front again, with other seeds: a front of luck is not worth its hypervolume.

A front is made of the best values seen, so it has more than its share of lucky trainings, and what is chosen
from it disappoints. Whoever is on it is therefore trained again until it has been trained so many times; its
values are the means, and where these do not hold it leaves the front. While a search is young much stands on
its front for a moment only: a member is trained again when it is there and a few trials with higher numbers
have begun, and a third time after many. This is the intensification of SMAC (Hutter, Hoos and Leyton-Brown,
"Sequential Model-Based Optimization for General Algorithm Configuration", 2011), with a front in place of
the one incumbent.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from autopeft.core.evaluation import Cost, Evaluation, TrialRecord, deviation_of

_REPLICATION_DELAY = 3  # before a member's second training
_DELAY_GROWTH = 8  # each further training waits for so many times as many
FAILED_SEEDS = "failed_seeds"
_PEAK_MEASURED = "peak_memory_measured"


def under_replicated(members: Iterable[TrialRecord], seeds: int) -> list[TrialRecord]:
    """Return the members of the front that were trained with fewer seeds than they are to be."""
    return [one for one in members if one.evaluation.trainings < seeds]


def replication_delay(trainings: int) -> int:
    """Return how many trials have to begin after a member that was trained so often, until it is again."""
    return int(_REPLICATION_DELAY * _DELAY_GROWTH ** (trainings - 1))


def next_to_replicate(waiting: Sequence[TrialRecord], latest: int, *, may_wait: bool) -> TrialRecord | None:
    """Return the member of the front to train again; None where none is due.

    Args:
        waiting: Those that lack trainings.
        latest: Number of the latest trial.
        may_wait: Whether trials may still be begun: a member waits for some that come after it.
    """

    def is_due(record: TrialRecord) -> bool:
        return not may_wait or latest - record.number >= replication_delay(record.evaluation.trainings)

    due = filter(is_due, waiting)
    return min(due, key=lambda one: (one.evaluation.trainings, one.number), default=None)


def cost_of_replicates(waiting: Sequence[TrialRecord], seeds: int) -> Cost:
    """Return what the trainings that members of the front lack will take, by those that they had."""
    missing = [one.evaluation.cost.times(seeds / one.evaluation.trainings - 1) for one in waiting]
    return sum(missing, Cost())


def evaluations_of(record: TrialRecord, rungs: Sequence[int]) -> int:
    """Return how often a trial was recorded: at each rung that it reached, and after each repeat.

    Args:
        record: The trial.
        rungs: Steps of the rungs, the whole training last.
    """
    trainings = record.evaluation.trainings
    if record.duplicate_of is not None:
        return 1
    if trainings > 1:
        return len(rungs) + trainings - 1
    return max(1, sum(step <= record.evaluation.cost.steps for step in rungs))


def with_replicate(evaluation: Evaluation, repeat: Evaluation, worst: Mapping[str, float]) -> Evaluation:
    """Return a whole training's evaluation together with that of another training of the same configuration.

    Metrics, times and losses become the means over the trainings, and each metric has its standard deviation
    beside it. A training that failed is a result: its metrics are the worst there are. The new training's
    curves stand after those there are, under names that say which training it is.

    Args:
        evaluation: What is known so far.
        repeat: The outcome of the other training.
        worst: Of each of the task's metrics.
    """
    by_seed = evaluation.each_training()
    number = len(by_seed) + 1
    failures = dict(evaluation.failures)
    outcome = dict(repeat.values)
    if repeat.status != "complete":
        failures[repeat.seed] = str(repeat.reason)
        outcome |= worst
    by_seed[repeat.seed] = outcome
    values = _means(list(by_seed.values()), worst)
    curves = [replace(one, metric=f"{one.metric}/training_{number}") for one in repeat.curves]
    return replace(
        evaluation,
        values=values | ({FAILED_SEEDS: float(len(failures))} if failures else {}),
        by_seed=by_seed,
        failures=failures,
        curves=(*evaluation.curves, *curves),
        cost=evaluation.cost + repeat.cost,
    )


def _means(trainings: Sequence[Mapping[str, float]], metrics: Collection[str]) -> dict[str, float]:
    """Return the mean of every value over the trainings that have it, and deviations of the metrics.

    What the allocator measured at most is the most of all trainings.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for one in trainings for name in one):
        values = [one[name] for one in trainings if name in one]
        found[name] = max(values) if name == _PEAK_MEASURED else statistics.fmean(values)
        if name in metrics and len(values) > 1:
            found[deviation_of(name)] = statistics.stdev(values)
    return found
