"""What trainings gain that inherit from the largest LoRA instead of starting from random weights.

    python -m benchmarks.warm_start [--dataset questions] [--configurations 16] [--seeds 3] [--runs FILE]

LoRA configurations that earlier searches trained from random weights, three in four from their fronts, each
with its learning rate there (chosen for random weights, that is), are trained with several seeds: from random
weights, from the largest LoRA that was trained with the same seed and is cut at every site to its largest
singular values, and from random weights for twice the steps. The first table has the mean of the best metric
on the validation split up to each third of a training, and that of the best weights on the test split. The
second has the rank correlation of the metric at each third with the metric of whole trainings from random
weights with the other seeds; means over seeds.
Compute is in CPU-seconds of this process, one thread, without what is inherited from, which is printed apart;
the first training at a depth also fills the cache of hidden states, hence medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from autopeft.core.configuration import Configuration
from autopeft.evaluation.derived import cut_state
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import InitialWeights
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.rank_correlation import spearman
from benchmarks.rivals.comparison import members_at, read_runs
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import TRAINING, Setting

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "search_cost_runs.jsonl.gz"
RANDOM, INHERITED = "random weights", "largest LoRA, cut"
LONGER = "random weights, twice the steps"
_THIRDS = (1 / 3, 2 / 3)
_FRONT_SHARE = 0.75


class Trial(NamedTuple):
    """Initial weights, index of the configuration, and seed of a training."""

    arm: str
    place: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training.

    Attributes:
        trial: What was trained.
        thirds: Best metric on the validation split up to each third; the trivial score if it failed.
        test: The metric on the test split.
        cpu_seconds: Compute of the training.
    """

    trial: Trial
    thirds: Sequence[float]
    test: float
    cpu_seconds: float


def chosen(dataset: str, evaluator: Evaluator, runs: Path, count: int) -> list[Configuration]:
    """Return configurations that autopeft's runs trained, most of them from the fronts."""
    metric, cost = evaluator.objectives
    on_front: dict[str, Configuration] = {}
    others: dict[str, Configuration] = {}
    for (method, its_dataset, _, _), log in read_runs(runs).items():
        if (method, its_dataset) != ("autopeft", dataset):
            continue
        members = members_at(log, log[-1].cpu_seconds, metric, cost)
        for entry in log:
            configuration = Configuration.from_dict(entry.configuration)
            if len(configuration):
                (on_front if entry in members else others)[configuration.key] = configuration
    generator = random.Random(0)
    rest = sorted(others.keys() - on_front.keys())
    if count > len(on_front) + len(rest):
        raise ValueError(f"The runs have {len(on_front) + len(rest)} configurations, fewer than {count}.")
    share = max(min(len(on_front), round(_FRONT_SHARE * count)), count - len(rest))
    first = [on_front[key] for key in generator.sample(sorted(on_front), share)]
    return first + [others[key] for key in generator.sample(rest, count - len(first))]


@dataclass(kw_only=True)
class Measured:
    """Everything that was trained.

    Attributes:
        points: The configurations.
        outcomes: Of every training.
        largest_seconds: Compute of each training of the largest LoRA.
    """

    points: list[Configuration]
    outcomes: list[Outcome] = field(default_factory=list)
    largest_seconds: list[float] = field(default_factory=list)


def outcome(
    evaluator: Evaluator, configuration: Configuration, start: InitialWeights | None, trial: Trial
) -> Outcome:
    """Train a configuration, and test it."""
    trained = evaluator.train(configuration, trial.seed, initial_weights=start)
    evaluation, metric = trained.evaluation, evaluator.monitor.name
    worst = evaluator.task.trivial_score(metric, evaluator.data)
    if trained.state is None:
        thirds, test = [worst] * len(evaluator.plan.rungs), worst
    else:
        by_step = {point.step: point.value for point in evaluation.curves if point.metric == metric}
        thirds = list(accumulate((by_step[step] for step in evaluator.plan.rungs), max))
        test = evaluator.test(configuration, trained.state)[metric]
    return Outcome(trial=trial, thirds=thirds, test=test, cpu_seconds=evaluation.cost.cpu_seconds)


def correlations(measured: Measured) -> dict[str, float]:
    """Return how well each early sight tells what the other seeds' trainings from random weights reach."""
    outcomes = measured.outcomes
    at_end: dict[int, dict[int, float]] = {}
    for training in outcomes:
        if training.trial.arm == RANDOM:
            at_end.setdefault(training.trial.seed, {})[training.trial.place] = training.thirds[-1]
    found: dict[str, list[float]] = {}
    for seed in at_end:
        others = [values for other, values in at_end.items() if other != seed]
        target = [statistics.fmean(values[place] for values in others) for place in sorted(at_end[seed])]
        for arm in (RANDOM, INHERITED):
            own = [outcome for outcome in outcomes if (outcome.trial.arm, outcome.trial.seed) == (arm, seed)]
            own.sort(key=lambda outcome: outcome.trial.place)
            for third in range(len(own[0].thirds)):
                early = [outcome.thirds[third] for outcome in own]
                found.setdefault(f"{arm}, after {third + 1}/3", []).append(spearman(early, target))
    return {name: statistics.fmean(values) for name, values in found.items()}


def show(dataset: str, measured: Measured, ranked: Mapping[str, float]) -> None:
    """Print both tables."""
    table = Table(title=f"{dataset}: mean metric of trainings initialised from")
    for heading in ("", "after 1/3", "2/3", "whole", "test split", "CPU-seconds (median)"):
        table.add_column(heading, justify="right" if heading else "left")
    for arm in (RANDOM, INHERITED, LONGER):
        own = [training for training in measured.outcomes if training.trial.arm == arm]
        by_third = zip(*(training.thirds for training in own), strict=True)
        thirds = [statistics.fmean(values) for values in by_third]
        test = statistics.fmean(training.test for training in own)
        seconds = statistics.median(training.cpu_seconds for training in own)
        table.add_row(arm, *(f"{value:.3f}" for value in (*thirds, test)), f"{seconds:.1f}")
    Console(width=110).print(table)
    print(f"The largest LoRA took {statistics.fmean(measured.largest_seconds):.1f} CPU-seconds.")
    table = Table(title=f"{dataset}: rank correlation with whole trainings from random weights, other seeds")
    table.add_column("")
    table.add_column("Spearman", justify="right")
    for name, value in ranked.items():
        table.add_row(name, f"{value:+.2f}")
    Console(width=110).print(table)


def evaluators_of(setting: Setting, cache: Path) -> tuple[Evaluator, Evaluator]:
    """Return what trains for the usual number of steps, and for twice as many."""
    backbone = setting.load()
    objectives = setting.evaluator(backbone).objectives

    def of(epochs: int) -> Evaluator:
        training = replace(TRAINING, epochs=epochs, precision="32-true", validate_every=epochs)
        return Evaluator(backbone, setting.task, training, objectives, rungs=_THIRDS, cache=cache)

    return of(TRAINING.epochs), of(2 * TRAINING.epochs)


def measure(setting: Setting, runs: Path, count: int, seeds: int) -> Measured:
    """Train everything."""
    with tempfile.TemporaryDirectory() as folder:
        usual, longer = evaluators_of(setting, Path(folder))
        _, largest = GUIDED.extremes(usual.backbone)
        found = Measured(points=chosen(setting.dataset, usual, runs, count))
        for seed in range(seeds):
            whole = usual.train(largest, seed)
            if whole.state is None:
                raise RuntimeError(f"The largest LoRA failed: {whole.evaluation.reason}")
            found.largest_seconds.append(whole.evaluation.cost.cpu_seconds)
            for place, point in enumerate(found.points):
                cut = cut_state(largest, whole.state, point)
                own = [
                    outcome(usual, point, None, Trial(RANDOM, place, seed)),
                    outcome(usual, point, cut, Trial(INHERITED, place, seed)),
                    outcome(longer, point, None, Trial(LONGER, place, seed)),
                ]
                found.outcomes += own
                print(seed, place, repr(point), *(f"{each.thirds[-1]:.2f}" for each in own), flush=True)
    return found


def main() -> None:
    """Train, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="questions", choices=list(DATASETS))
    parser.add_argument("--configurations", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=RUNS)
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds is 2 or more: one seed's trainings are compared with the others'")
    torch.set_num_threads(1)
    setting = Setting(dataset=given.dataset, seed=0, trials=1)
    found = measure(setting, given.runs, given.configurations, given.seeds)
    ranked = correlations(found)
    show(given.dataset, found, ranked)
    record = {
        "command": f"python -m benchmarks.warm_start --dataset {given.dataset} "
        f"--configurations {given.configurations} --seeds {given.seeds}"
        + ("" if given.runs == RUNS else f" --runs {given.runs.name}"),
        "machine": this_machine("1 thread"),
        "metric": setting.metric,
        "largest_cpu_seconds": found.largest_seconds,
        "correlations": ranked,
        "outcomes": [{**asdict(each), "trial": each.trial._asdict()} for each in found.outcomes],
        "configurations": [configuration.to_dict() for configuration in found.points],
    }
    path = RESULTS / f"warm_start_{given.dataset}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
