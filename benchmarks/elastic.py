"""Does inference with an elastic adapter's weights rank configurations as trainings of their own do?

    python -m benchmarks.elastic [--dataset questions] [--configurations 24] [--seeds 2] [--lengths 1 3]

Points of `PerLayer` (its reference points, and even draws) are trained one by one, with several seeds.
Elastic adapters, trained once for 1 and 3 trainings' steps, score the same points by inference. The table
has the rank correlation of each with the mean over the seeds, beside that of the number of parameters and
that of one seed with the next: much better than that nothing can rank. Compute is in CPU-seconds of this
process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from assets.prepare import prepare
from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.supernet.supernet import ElasticAdapter
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS

RESULTS = Path(__file__).parent / "results"
EXAMPLES = {"train": 512, "validation": 300, "test": 100}
TRAINING = Training(epochs=3, batch_size=16, validate_every=3, device="cpu", precision="32-true")
SPACE = PerLayer(methods=("lora",), ranks=(1, 16), learning_rate=2e-3)


def chosen(backbone: Backbone, count: int) -> list[Configuration]:
    """Return the space's reference points and even draws from it, without repeats."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = dict.fromkeys(baseline.configuration for baseline in SPACE.baselines(backbone))
    while len(found) < count:
        found[SPACE.suggest(study.ask(), backbone)] = None
    return list(found)[:count]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def main() -> None:
    """Train, score, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="questions", choices=list(DATASETS))
    parser.add_argument("--configurations", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lengths", type=float, nargs="+", default=[1, 3])
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = DATASETS[given.dataset]
    task = data.task(**EXAMPLES)
    backbone = Backbone.load(str(prepare("minilm")), task)
    objectives = resolve_objectives((data.metric, "trainable_parameters"), task.metrics)
    evaluator = Evaluator(backbone, task, TRAINING, objectives)
    points = chosen(backbone, given.configurations)
    _, largest = SPACE.extremes(backbone)

    rows: list[dict[str, Any]] = []
    elastic = {}
    for length in given.lengths:
        adapter = ElasticAdapter.train(evaluator, largest, trainings=length)
        scoring = adapter.score(evaluator, points)
        elastic[length] = [one.metrics[data.metric] for one in scoring.scores]
        rows.append(
            {
                "name": f"elastic, {length:g} trainings",
                "metric": elastic[length],
                "loss": [one.loss for one in scoring.scores],
                "training_cpu_seconds": adapter.cost.cpu_seconds,
                "scoring_cpu_seconds": scoring.cost.cpu_seconds / len(points),
                "passes": scoring.passes,
            }
        )
        print(f"elastic of {length:g} trainings: {adapter.cost.cpu_seconds:.0f} s", flush=True)

    trained: list[list[float]] = []
    seconds: list[float] = []
    for number, point in enumerate(points):
        outcomes = [evaluator.evaluate(point, seed) for seed in range(given.seeds)]
        trained.append([one.values[data.metric] for one in outcomes])
        seconds += [one.cost.cpu_seconds for one in outcomes]
        print(f"{number + 1}/{len(points)} {point!r} {trained[-1]} {seconds[-1]:.0f} s", flush=True)
    report(given, points, trained, rows, statistics.mean(seconds), backbone)


def report(
    given: argparse.Namespace,
    points: Sequence[Configuration],
    trained: Sequence[Sequence[float]],
    rows: Sequence[dict[str, Any]],
    seconds: float,
    backbone: Backbone,
) -> None:
    """Compare, print a table, write JSON."""
    baselines = len(SPACE.baselines(backbone))
    mean = [statistics.mean(one) for one in trained]
    seeds = [[one[seed] for one in trained] for seed in range(given.seeds)]
    parameters = [float(count_parameters(backbone, one)) for one in points]

    def both(values: Sequence[float], target: Sequence[float] = mean) -> tuple[float, float]:
        return spearman(values, target), spearman(values[baselines:], target[baselines:])

    lines = [("one seed against the next", *both(first, second)) for first, second in pairwise(seeds)]
    lines.append(("number of parameters", *both(parameters)))
    for row in rows:
        lines.append((f"{row['name']}: metric", *both(row["metric"])))
        lines.append((f"{row['name']}: loss", *both([-one for one in row["loss"]])))
    table = Table(title=f"{given.dataset}: Spearman with the trained metric, {len(points)} configurations")
    for heading in ("", "all", "draws alone"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, whole, draws in lines:
        table.add_row(name, f"{whole:+.2f}", f"{draws:+.2f}")
    Console().print(table)
    for row in rows:
        print(
            f"{row['name']}: {row['training_cpu_seconds'] / seconds:.2f} trainings of one configuration, "
            f"scoring one {row['scoring_cpu_seconds'] / seconds:.3f}"
        )
    record = {
        "command": f"python -m benchmarks.elastic --dataset {given.dataset} "
        f"--configurations {given.configurations} --seeds {given.seeds}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, 1 thread",
        "training_cpu_seconds": seconds,
        "correlations": [{"what": name, "all": whole, "draws": draws} for name, whole, draws in lines],
        "elastic": list(rows),
        "trained": [list(one) for one in trained],
        "parameters": parameters,
        "configurations": [one.to_dict() for one in points],
    }
    path = RESULTS / f"elastic_{given.dataset}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
