"""Whether a search beats what a uniform LoRA sweep buys: hypervolume on the test split, with an interval."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis, hypervolume

UNKNOWN = "Not yet compared with a uniform LoRA sweep: run `autopeft verdict` or `search.verdict()`."
_NORMAL_95 = 1.96


@dataclass(frozen=True, kw_only=True)
class FinalPoint:
    """A point of a front that was trained again.

    Attributes:
        costs: Its objectives but the metric.
        tests: The metric on the test split, then on bootstrap samples of it, of shape (seeds, 1 + samples).
    """

    costs: Mapping[str, float]
    tests: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a search's front is worth beside a uniform LoRA sweep's.

    Attributes:
        search: Hypervolume of the search's front on the test split, means over fresh seeds.
        uniform: The same of the sweep's front and the head alone.
        margin: Half of the 95 % interval of the difference, by bootstrap over seeds and rows.
        head: What the head alone has on the test split, in words.
        seeds: Fresh seeds that each point was trained with.
        share: Compute of the sweep, as a share of what the search took; 0 where no uniform LoRA could be
            trained within the constraints, so that the head alone stands for the sweep.
        take: The best of the sweep and the head alone, in words.
        full: What full fine-tuning has on the test split, in words; empty where it was not asked for.
    """

    search: float
    uniform: float
    margin: float
    head: str
    seeds: int
    share: float
    take: str
    full: str = ""

    @property
    def beats(self) -> bool:
        """Whether the search is better, outside the interval."""
        return self.search - self.uniform > self.margin

    def __str__(self) -> str:
        difference = f"{self.search - self.uniform:+.4f} ± {self.margin:.4f} hypervolume"
        swept = (
            f"a sweep of {self.share:.0%} of the search's compute"
            if self.share
            else "the head alone in its place, as no uniform LoRA could be trained within the constraints"
        )
        told = (
            f"on the test split ({self.search:.4f} against {self.uniform:.4f}; "
            f"{'; '.join(filter(None, (self.head, self.full)))}; {self.seeds} fresh seeds, {swept})"
        )
        if self.beats:
            return f"The front beats a uniform LoRA sweep: {difference} {told}."
        return f"No better than a uniform LoRA sweep, {difference} {told}: take {self.take}."

    def _repr_html_(self) -> str:
        mark = "✓" if self.beats else "✗"
        return f"<p><strong>{mark}</strong> {html.escape(str(self))}</p>"


def compare(
    search: Sequence[FinalPoint],
    uniform: Sequence[FinalPoint],
    axes: Sequence[Axis],
    metric: Objective,
    *,
    head: str,
    share: float,
    take: str,
) -> Verdict:
    """Return the verdict on two fronts; see `Verdict`."""
    generator = np.random.default_rng(0)
    axes = [axis for axis in axes if axis.objective == metric or not axis.objective.is_metric]
    seeds, samples = search[0].tests.shape

    def value(points: Sequence[FinalPoint], sample: int) -> float:
        """Return the hypervolume on a sample, with seeds drawn anew; 0 is the split itself with all."""
        means = [
            point.tests[generator.integers(seeds, size=seeds) if sample else slice(None), sample].mean()
            for point in points
        ]
        values = [{**point.costs, metric.name: mean} for point, mean in zip(points, means, strict=True)]
        return hypervolume(values, axes)

    both = [(value(search, sample), value(uniform, sample)) for sample in range(samples)]
    differences = [ours - theirs for ours, theirs in both[1:]]
    return Verdict(
        search=both[0][0],
        uniform=both[0][1],
        margin=_NORMAL_95 * float(np.std(differences, ddof=1)),
        head=head,
        seeds=seeds,
        share=share,
        take=take,
    )


def state_of(records: Sequence[TrialRecord]) -> list[int]:
    """Return the trials, trainings and steps of a search: what a verdict was reached on."""
    own = [record.evaluation for record in records if record.derived_from is None]
    trainings = sum(evaluation.trainings for evaluation in own)
    return [len(own), trainings, sum(evaluation.cost.steps for evaluation in own)]


def stored_verdict(kept: Mapping[str, Any], records: Sequence[TrialRecord]) -> str:
    """Return the verdict that a study keeps; it is not known where more was trained since."""
    return str(kept["text"]) if kept.get("state") == state_of(records) else UNKNOWN


def joint_axes(axes: Sequence[Axis], others: Sequence[Axis]) -> list[Axis]:
    """Return axes that span both: each from the worse end to the better one."""
    by_name = {axis.objective.name: axis for axis in others}

    def joined(axis: Axis) -> Axis:
        other, objective = by_name.get(axis.objective.name, axis), axis.objective
        ends = (axis.worst, axis.best, other.worst, other.best)
        best, worst = objective.best(ends), min(ends, key=lambda end: objective.sign * end)
        return replace(axis, worst=worst, best=best)

    return [joined(axis) for axis in axes]
