"""Several trainings of one configuration as one evaluation: means and standard deviations over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from autopeft.core.evaluation import Evaluation, deviation_of

FAILED_SEEDS = "failed_seeds"
_PEAK_MEASURED = "peak_memory_measured"


def with_replicate(evaluation: Evaluation, replicate: Evaluation, worst: Mapping[str, float]) -> Evaluation:
    """Return a whole training's evaluation together with that of another training of the same configuration.

    Metrics, times and losses become the means over the trainings, and each metric has its standard deviation
    beside it. A training that failed is a result: its metrics are the worst there are. The new training's
    curves stand after those there are, under names that say which training it is.

    Args:
        evaluation: What is known so far.
        replicate: The outcome of the other training.
        worst: Of each of the task's metrics.
    """
    by_seed = evaluation.each_training()
    number = len(by_seed) + 1
    failures = dict(evaluation.failures)
    outcome = dict(replicate.values)
    if replicate.status != "complete":
        failures[replicate.seed] = str(replicate.reason)
        outcome |= worst
    by_seed[replicate.seed] = outcome
    values = _means(list(by_seed.values()), worst)
    curves = [replace(point, metric=f"{point.metric}/training_{number}") for point in replicate.curves]
    return replace(
        evaluation,
        values=values | ({FAILED_SEEDS: float(len(failures))} if failures else {}),
        by_seed=by_seed,
        failures=failures,
        curves=(*evaluation.curves, *curves),
        cost=evaluation.cost + replicate.cost,
    )


def _means(trainings: Sequence[Mapping[str, float]], metrics: Collection[str]) -> dict[str, float]:
    """Return the mean of every value over the trainings that have it, and deviations of the metrics.

    What the allocator measured at most is the most of all trainings.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for values in trainings for name in values):
        values = [training[name] for training in trainings if name in training]
        found[name] = max(values) if name == _PEAK_MEASURED else statistics.fmean(values)
        if name in metrics and len(values) > 1:
            found[deviation_of(name)] = statistics.stdev(values)
    return found
