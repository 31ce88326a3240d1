"""What came out of evaluating one configuration, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from typing import Any, Literal

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import Objective

Status = Literal["complete", "paused", "failed", "infeasible"]
VALIDATION_LOSS = "validation_loss"
"""Name of the validation split's loss: in curves, and in values that of the best validation."""


FAILED_SEEDS = "failed_seeds"
DERIVED_NUMBERS = 100_000
"""A trial's number and those of the points derived from it are so far apart: no search has more trials."""
_PEAK_MEASURED = "peak_memory_measured"
_OF_TRAINING = "/training_"  # between a metric and a training's number, in the names of further curves


def deviation_of(metric: str) -> str:
    """Return the name of a metric's standard deviation over several trainings."""
    return f"{metric}_std"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Compute spent on an evaluation.

    Attributes:
        wall_seconds: Elapsed time.
        cpu_seconds: Processor time of the whole process, over all threads.
        gpu_seconds: Elapsed time in which the evaluation held a GPU; 0 on the CPU.
        steps: Optimizer steps.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    steps: int = 0

    def times(self, share: float) -> Cost:
        """Return a share of the time; steps are not shared."""
        seconds = {name: value * share for name, value in asdict(self).items() if name != "steps"}
        return Cost(**seconds, steps=self.steps)

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def __sub__(self, other: Cost) -> Cost:
        return Cost(**{name: value - getattr(other, name) for name, value in asdict(self).items()})

    @classmethod
    def total(cls, costs: Sequence[Cost]) -> Cost:
        """Return the sum of many, in their order."""
        return cls(**{each.name: sum(map(attrgetter(each.name), costs)) for each in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of a learning curve: a metric's value after an optimizer step."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The outcome of one configuration.

    Attributes:
        configuration: What was evaluated.
        status: "complete" has every objective's value; "paused" was trained in part and has the values of
            its best validation so far; "failed" and "infeasible" keep the values known before training.
        reason: Why it did not complete; None when complete.
        fidelity: Share of the training it was given, in [0, 1]; below 1 when paused.
        values: Metrics and objectives by name. Memory in bytes, times in seconds.
        curves: Learning curves, in the order in which they were recorded.
        cost: Compute spent.
        seed: Seed of initialisation, shuffling and dropout, of the first training.
        by_seed: The values of each training, by its seed, where there were several; `values` has the means.
        failures: Why a training failed, by its seed, of those after the first.
        warm_start: Whether its trainings were initialised from given weights instead of random ones: in a
            search, those of the largest LoRA, cut.
        derived: What its trainings gave when they were cut to fewer parameters.
    """

    configuration: Configuration
    status: Status
    reason: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    curves: tuple[CurvePoint, ...] = ()
    cost: Cost = Cost()
    seed: int = 0
    fidelity: float = 1.0
    by_seed: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    failures: Mapping[int, str] = field(default_factory=dict)
    warm_start: bool = False
    derived: tuple[Evaluation, ...] = ()

    @property
    def values_at_end(self) -> Mapping[str, float]:
        """The values without the ranks that were closed in training, where they were allocated there."""
        is_cut = self.configuration.allocation is not None and len(self.derived) > 0
        return self.derived[0].values if is_cut else self.values

    @property
    def trainings(self) -> int:
        """Number of whole trainings behind the values, at least 1 (also while the first is paused)."""
        return max(1, len(self.by_seed))

    def deviation(self, objective: Objective) -> float | None:
        """Return the standard deviation of a metric over several trainings; None where there was one."""
        return self.values.get(deviation_of(objective.name)) if self.by_seed else None

    def curves_of(self, metric: str) -> list[list[CurvePoint]]:
        """Return a metric's learning curves, one a training that has some."""
        found: dict[str, list[CurvePoint]] = {}
        for point in self.curves:
            if point.metric.partition(_OF_TRAINING)[0] == metric:
                found.setdefault(point.metric, []).append(point)
        return list(found.values())

    def format(self, objective: Objective) -> str:
        """Return an objective's value as text, with its standard deviation where there is one."""
        deviation = self.deviation(objective)
        text = objective.format(self.values[objective.name])
        return text if deviation is None else f"{text} ± {objective.format(deviation)}"

    def each_training(self) -> dict[int, Mapping[str, float]]:
        """Return the values of every training by its seed, also where there was one alone."""
        return dict(self.by_seed) or {self.seed: self.values}

    @property
    def initialised_from(self) -> str:
        """What its trainings were initialised from, in words."""
        return "the largest LoRA" if self.warm_start else "random weights"

    def describe_trainings(self, kept: int | None) -> str:
        """Say how many trainings there were, and of which, by its seed, the tensors were kept."""
        if not self.by_seed:
            return "1"
        which = [*self.by_seed].index(kept) + 1 if kept is not None and kept in self.by_seed else "one"
        return f"{self.trainings}, of which the validation figures are the means; this is number {which}"

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as plain data (for JSON)."""
        return {
            **vars(self),
            "configuration": self.configuration.to_dict(),
            "values": dict(self.values),
            "curves": [[point.metric, point.step, point.value] for point in self.curves],
            "cost": asdict(self.cost),
            "by_seed": {str(seed): dict(values) for seed, values in self.by_seed.items()},
            "failures": {str(seed): reason for seed, reason in self.failures.items()},
            "derived": [point.to_dict() for point in self.derived],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read what `to_dict` gave."""
        read = {
            "configuration": Configuration.from_dict(data["configuration"]),
            "curves": tuple(
                CurvePoint(metric=metric, step=step, value=value) for metric, step, value in data["curves"]
            ),
            "cost": Cost(**data["cost"]),
            "by_seed": {int(seed): values for seed, values in data["by_seed"].items()},
            "failures": {int(seed): reason for seed, reason in data["failures"].items()},
            "derived": tuple(cls.from_dict(point) for point in data.get("derived", ())),
        }
        return cls(**{**data, **read})


def with_replicate(evaluation: Evaluation, replicate: Evaluation, worst: Mapping[str, float]) -> Evaluation:
    """Return a whole training's evaluation together with that of another training of the same configuration.

    Metrics, times and losses become the means over the trainings, and each metric has its standard deviation
    beside it. A training that failed is a result: its metrics are the worst there are, as in `worst`. The new
    training's curves stand after those there are, under names that say which training it is. What was derived
    from the first has its replicate in what was derived from the other.
    """
    by_seed = evaluation.each_training()
    number = len(by_seed) + 1
    failures = dict(evaluation.failures)
    outcome = dict(replicate.values)
    if replicate.status != "complete":
        failures[replicate.seed] = str(replicate.reason)
        outcome |= {name: value for name, value in worst.items() if name in evaluation.values}
    by_seed[replicate.seed] = outcome
    values = _means(list(by_seed.values()), worst)
    curves = [replace(point, metric=f"{point.metric}{_OF_TRAINING}{number}") for point in replicate.curves]
    lost = replace(replicate, values={}, curves=(), cost=Cost())
    others = replicate.derived or [lost] * len(evaluation.derived)
    derived = zip(evaluation.derived, others, strict=True)
    return replace(
        evaluation,
        derived=tuple(with_replicate(point, other, worst) for point, other in derived),
        values=values | ({FAILED_SEEDS: float(len(failures))} if failures else {}),
        by_seed=by_seed,
        failures=failures,
        curves=(*evaluation.curves, *curves),
        cost=evaluation.cost + replicate.cost,
    )


def _means(trainings: Sequence[Mapping[str, float]], metrics: Collection[str]) -> dict[str, float]:
    """Return the mean of every value (of peaks, the highest) over the trainings, and metrics' deviations."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for values in trainings for name in values):
        values = [training[name] for training in trainings if name in training]
        found[name] = max(values) if name == _PEAK_MEASURED else statistics.fmean(values)
        if name in metrics and len(values) > 1:
            found[deviation_of(name)] = statistics.stdev(values)
    return found


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a search: finished, or paused at a rung.

    Attributes:
        number: The trial's number in the study, from 0.
        evaluation: Its outcome.
        duplicate_of: Number of the earlier trial with the same configuration, whose outcome this
            trial took over without training; None where it was trained itself.
        baseline: Name of the baseline configuration this trial is ("lora(8) everywhere"), None when sampled.
        derived_from: Number of the trial whose trainings were cut to give this point, which was not trained
            itself; None for a trial.
    """

    number: int
    evaluation: Evaluation
    duplicate_of: int | None = None
    baseline: str | None = None
    derived_from: int | None = None

    @property
    def trained(self) -> int:
        """The number of the trial that was trained: its own, or that of the one it was cut from."""
        return self.number if self.derived_from is None else self.derived_from

    @property
    def points(self) -> list[TrialRecord]:
        """The record itself, then those of the points derived from the trial; a duplicate has none."""
        derived = self.evaluation.derived if self.duplicate_of is None else ()
        return [self] + [
            TrialRecord(
                number=self.number + place * DERIVED_NUMBERS, evaluation=point, derived_from=self.number
            )
            for place, point in enumerate(derived, start=1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data (for JSON)."""
        return {**vars(self), "evaluation": self.evaluation.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Read what `to_dict` gave."""
        return cls(**{**data, "evaluation": Evaluation.from_dict(data["evaluation"])})
