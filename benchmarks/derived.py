"""What points cut from trainings add to a front: after k trainings with them, against without them.

    python -m benchmarks.derived [--dataset questions] [--seeds 2] [--arms search uniform]

Trials are trained to the end and once, by a search (the default space and sampler) or as a uniform sweep of
LoRA on all linear modules (ranks and learning rates drawn at random). They do not depend on the cuts, so one
run gives both fronts. Fronts are chosen on the validation split and valued on the test split. The front
without cuts is that at the same processor time: what the cuts took goes to further trials, of which two are
run at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from assets.prepare import prepare
from autopeft import Search, Training
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.pareto import Axis, Values, hypervolume, non_dominated
from autopeft.evaluation.executor import LocalExecutor
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.search_spaces import ScoreGuided, Uniform
from benchmarks.datasets import DATASETS

RESULTS = Path(__file__).parent / "results"
TRAININGS = (1, 2, 4, 8)
ARMS: dict[str, dict[str, Any]] = {
    "search": {"space": ScoreGuided()},
    "uniform": {"space": Uniform(sizes={"rank": (1, 64)}), "sampler": "random"},
}
EXAMPLES = {"train": 1024, "validation": 500, "test": 500}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial or a cut, with its objectives on both splits."""

    validation: Values
    test: Values


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial with its cuts, and the processor time of its training and of cutting and measuring it."""

    points: Sequence[Point]  # the trial's own first
    training_seconds: float
    cutting_seconds: float


class Tested(LocalExecutor):
    """Tests what a job has left before the search drops it, and takes the time of cuts."""

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__(runner)
        self.trials: list[Trial] = []
        self._cutting = 0.0
        self._measure = runner.evaluator.measure
        runner.evaluator.measure = self._timed  # type: ignore[method-assign]

    def _timed(
        self, configuration: Configuration, state: Mapping[str, Tensor], frozen: int | None
    ) -> dict[str, float]:
        started = time.process_time()
        found = self._measure(configuration, state, frozen)
        self._cutting += time.process_time() - started
        return found

    def wait(self) -> TrialRecord:
        """Run a job, and keep what its points are worth."""
        self._cutting = 0.0
        record = super().wait()
        evaluator, points = self._runner.evaluator, []
        names = [objective.name for objective in evaluator.objectives]
        for point in record.points:
            state = self._runner.checkpoints.load(point)
            if state is not None and record.duplicate_of is None:
                found = {name: point.evaluation.values[name] for name in names}
                test = evaluator.test(point.evaluation.configuration, state)
                on_test = {name: test.get(name, value) for name, value in found.items()}
                points.append(Point(validation=found, test=on_test))
        if points:
            seconds = record.evaluation.cost.cpu_seconds - self._cutting
            trial = Trial(points=points, training_seconds=seconds, cutting_seconds=self._cutting)
            self.trials.append(trial)
        return record


def run(dataset: str, arm: str, seed: int) -> tuple[list[Trial], tuple[Axis, ...]]:
    """Run a search, and return its trials and the axes of its hypervolume."""
    executors: list[Tested] = []

    def tested(runner: TrialRunner) -> Tested:
        executors.append(Tested(runner))
        return executors[0]

    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            str(prepare("minilm")),
            DATASETS[dataset].task(**EXAMPLES),
            objectives=(DATASETS[dataset].metric, "trainable_parameters", "peak_memory"),
            training=Training(epochs=3, batch_size=32, device="cpu"),
            halving=None,
            seeds=1,
            seed=seed,
            derive=True,
            executor=tested,
            folder=folder,
            tracking=None,
            **ARMS[arm],
        )
        search.run(trials=max(TRAININGS) + 2, progress=False)
        return executors[0].trials, search.open().axes


def valued(points: Sequence[Point], axes: Sequence[Axis]) -> float:
    """Return the hypervolume on the test split of the front on the validation split."""
    objectives = [axis.objective for axis in axes]
    flags = non_dominated([point.validation for point in points], objectives)
    return hypervolume([point.test for point, kept in zip(points, flags, strict=True) if kept], axes)


def compared(trials: Sequence[Trial], axes: Sequence[Axis], count: int) -> dict[str, float]:
    """Return the hypervolume after so many trainings with cuts, and without in the same processor time."""
    first = trials[:count]
    seconds = sum(trial.training_seconds + trial.cutting_seconds for trial in first)
    without: list[Point] = []
    spent = 0.0
    for trial in trials:
        spent += trial.training_seconds
        if spent <= seconds:
            without.append(trial.points[0])
    return {
        "with": valued([point for trial in first for point in trial.points], axes),
        "without": valued(without, axes),
        "cuts": float(sum(len(trial.points) - 1 for trial in first)),
        "cpu_seconds": seconds,
        "cutting_share": sum(trial.cutting_seconds for trial in first) / seconds,
    }


def main() -> None:
    """Measure, print a table, and add to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="questions", choices=DATASETS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    arguments = parser.parse_args()
    path = RESULTS / f"derived_{arguments.dataset}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(arguments.seeds):
        for arm in arguments.arms:
            if (key := f"{arm} {seed}") not in results:
                trials, axes = run(arguments.dataset, arm, seed)
                by_count = {str(count): compared(trials, axes, count) for count in TRAININGS}
                results[key] = {"by_trainings": by_count, "trials": [asdict(trial) for trial in trials]}
                path.write_text(json.dumps(results, indent=1) + "\n")
    table = Table(title=f"{arguments.dataset}: hypervolume on the test split, means over seeds")
    for heading in ("arm", "trainings", "with cuts", "without", "cuts", "share of the time"):
        table.add_column(heading, justify="right" if heading != "arm" else "left")
    for arm in arguments.arms:
        of_arm = [results[f"{arm} {seed}"]["by_trainings"] for seed in range(arguments.seeds)]
        for count in TRAININGS:
            names = ("with", "without", "cuts", "cutting_share")
            means = [statistics.fmean(found[str(count)][name] for found in of_arm) for name in names]
            table.add_row(
                arm,
                str(count),
                *(f"{value:.4f}" for value in means[:2]),
                f"{means[2]:.1f}",
                f"{means[3]:.1%}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
