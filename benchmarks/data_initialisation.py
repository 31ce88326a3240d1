"""What LoRA gains that begins from data: EVA, LoRA-GA and CorDA beside LoRA.

    python -m benchmarks.data_initialisation [--dataset questions] [--rates 1e-3 3e-3 1e-2 3e-2] [--seeds 3]

MiniLM with rank 8 on query and value, 256 training rows, two epochs. For each method the configuration's
learning rate is chosen on the validation split with the first seed; the table has the accuracies at that rate
and the median CPU-seconds of a training, the passes for initial values included. Each training is kept under
the factor that its method's rate had, and none is repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Adapter, Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.rivals.setting import TRAINING, Setting

RESULTS = Path(__file__).parent / "results"
METHODS = ("lora", "eva", "lora_ga", "corda")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ROLES = ("query", "value")
EPOCHS = 2


@cache
def evaluator(dataset: str) -> Evaluator:
    """Return what trains on a data set."""
    setting = Setting(dataset=dataset, seed=0, trials=1)
    objectives = resolve_objectives((setting.metric, "trainable_parameters"), setting.task.metrics)
    training = replace(TRAINING, epochs=EPOCHS, validate_every=EPOCHS)
    return Evaluator(setting.load(), setting.task, training, objectives)


def train(dataset: str, method: str, rate: float, seed: int) -> dict[str, float]:
    """Train a method once, and test it."""
    bench = evaluator(dataset)
    sites = [site for site in bench.backbone.sites if site.role in ROLES]
    configuration = Configuration(dict.fromkeys(sites, Adapter(method, 8)), learning_rate=rate)
    trained, metric = bench.train(configuration, seed), bench.monitor.name
    if trained.state is None:
        raise RuntimeError(f"{method} failed: {trained.evaluation.reason}")
    return {
        "validation": trained.evaluation.values[metric],
        "test": bench.test(configuration, trained.state)[metric],
        "cpu_seconds": trained.evaluation.cost.cpu_seconds,
    }


def outcome(dataset: str, method: str, rate: float, seed: int) -> dict[str, float]:
    """Return what a training reached: of one that was kept, or else of a new one, which is kept."""
    path = RESULTS / f"data_initialisation_{dataset}.json"
    kept: dict[str, dict[str, float]] = json.loads(path.read_text())["trainings"] if path.exists() else {}
    key = f"{method}, factor {METHOD_SPECS[method].rate:g}, rate {rate:g}, seed {seed}"
    if key not in kept:
        kept[key] = train(dataset, method, rate, seed)
        print(key, kept[key], flush=True)
        machine = this_machine("1 thread")
        path.write_text(json.dumps({"machine": machine, "trainings": kept}, indent=1) + "\n")
    return kept[key]


def row(dataset: str, method: str, rates: list[float], seeds: int) -> list[str]:
    """Return a method's cells: those of the rate that is best on the validation split with the first seed."""
    rate = max(rates, key=lambda each: outcome(dataset, method, each, 0)["validation"])
    own = [outcome(dataset, method, rate, seed) for seed in range(seeds)]
    validation, test = ([training[split] for training in own] for split in ("validation", "test"))
    seconds = statistics.median(training["cpu_seconds"] for training in own)
    means = (f"{statistics.fmean(accuracies):.3f}" for accuracies in (validation, test))
    return [method, f"{rate:g}", ", ".join(f"{each:.3f}" for each in test), *means, f"{seconds:.1f}"]


def main() -> None:
    """Train what is not kept yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="questions", choices=list(DATASETS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("method", "rate", "test, each seed", "validation", "test", "CPU-seconds")
    for method in METHODS:
        table.add_row(*row(given.dataset, method, given.rates, given.seeds))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
