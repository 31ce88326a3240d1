"""What LoRA gains that begins from data: EVA, LoRA-GA and CorDA beside LoRA.

    python -m benchmarks.data_initialisation [--dataset questions] [--epochs 2] [--seeds 3]

MiniLM with rank 8 on query and value, 256 training rows. For each method the configuration's learning rate
is chosen on the validation split with the first seed; the table has the means over all seeds at that rate, on
the validation and the test split, and the median CPU-seconds of a training, the passes for initial values
included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Adapter, Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from benchmarks.datasets import DATASETS
from benchmarks.rivals.setting import TRAINING, Setting

RESULTS = Path(__file__).parent / "results"
METHODS = ("lora", "eva", "lora_ga", "corda")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ROLES = ("query", "value")


def train(evaluator: Evaluator, method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train a method once, and test it."""
    sites = [site for site in evaluator.backbone.sites if site.role in ROLES]
    configuration = Configuration(dict.fromkeys(sites, Adapter(method, 8)), learning_rate=rate)
    trained, metric = evaluator.train(configuration, seed), evaluator.monitor.name
    if trained.state is None:
        raise RuntimeError(f"{method} failed: {trained.evaluation.reason}")
    outcome = {
        "method": method,
        "rate": rate,
        "seed": seed,
        "validation": trained.evaluation.values[metric],
        "test": evaluator.test(configuration, trained.state)[metric],
        "cpu_seconds": trained.evaluation.cost.cpu_seconds,
    }
    print(outcome, flush=True)
    return outcome


def measure(evaluator: Evaluator, method: str, seeds: int) -> list[dict[str, Any]]:
    """Choose the learning rate with the first seed, and train with the others."""
    first = [train(evaluator, method, rate, 0) for rate in RATES]
    best = max(first, key=lambda outcome: outcome["validation"])
    return first + [train(evaluator, method, best["rate"], seed) for seed in range(1, seeds)]


def row(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a method's cells: those of its last training's learning rate."""
    own = [outcome for outcome in outcomes if outcome["rate"] == outcomes[-1]["rate"]]
    means = [statistics.fmean(outcome[split] for outcome in own) for split in ("validation", "test")]
    seconds = statistics.median(outcome["cpu_seconds"] for outcome in outcomes)
    return [own[0]["method"], f"{own[0]['rate']:g}", *(f"{mean:.3f}" for mean in means), f"{seconds:.1f}"]


def main() -> None:
    """Train, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="questions", choices=list(DATASETS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting = Setting(dataset=given.dataset, seed=0, trials=1)
    training = replace(TRAINING, epochs=given.epochs, validate_every=given.epochs)
    objectives = resolve_objectives((setting.metric, "trainable_parameters"), setting.task.metrics)
    evaluator = Evaluator(setting.load(), setting.task, training, objectives)
    title = f"{given.dataset}: {setting.metric}, means of {given.seeds} seeds"
    table = Table("method", "rate", "validation", "test", "CPU-seconds", title=title)
    outcomes = []
    for method in METHODS:
        outcomes += (found := measure(evaluator, method, given.seeds))
        table.add_row(*row(found))
    Console(width=100).print(table)
    machine = f"{platform.platform()}, {os.cpu_count()} cores, 1 thread"
    record = {"arguments": vars(given), "machine": machine, "trainings": outcomes}
    path = RESULTS / f"data_initialisation_{given.dataset}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
