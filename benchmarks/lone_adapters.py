"""How much does one smallest adapter alone reach at each site, and do scores foretell it?

    python -m benchmarks.lone_adapters [--datasets questions spam] [--seeds 2] [--rate 0.01]

For every site of MiniLM, one LoRA of rank 1 is trained there and nowhere else, beside the head, from random
weights and with a few seeds, and scored on the test split. The table has the sites from the best to the
worst, and Spearman's rank correlation of their means with the scores that `ScoreGuided` goes by, and of one
seed with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autopeft.adapter import Site
from autopeft.configuration import Configuration
from autopeft.methods import count_parameters
from autopeft.search_spaces.allocated import site_values
from autopeft.site_scoring import score_sites
from benchmarks.elastic import spearman
from benchmarks.rivals.comparison import FRESH_SEEDS
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import RATE
from benchmarks.search_cost import fresh_evaluator

RESULTS = Path(__file__).parent / "results" / "lone_adapters.json"


def reached(dataset: str, seed: int, rate: float) -> dict[str, float]:
    """Return the score on the test split of one LoRA of rank 1 at each site, and of the head alone.

    Args:
        dataset: Name of the data set.
        seed: Of the trainings.
        rate: Learning rate of all.
    """
    evaluator = fresh_evaluator(dataset, seed)
    found = {}
    for name, configuration in _candidates(GUIDED.choices(evaluator.backbone), rate).items():
        state = evaluator.train(configuration).state
        found[name] = 0.0 if state is None else evaluator.test(configuration, state)[evaluator.monitor]
    return found


def _candidates(choices: Mapping[Site, Mapping[str, Any]], rate: float) -> dict[str, Configuration]:
    found = {"head alone": Configuration({}, learning_rate=rate)}
    for site, methods in choices.items():
        found[str(site)] = Configuration({site: methods["lora"].of_size(1)}, learning_rate=rate)
    return found


def measure(dataset: str, per_seed: Sequence[Mapping[str, float]], rate: float) -> dict[str, Any]:
    """Return the sites' scores from the best to the worst, and how well they are foretold."""
    evaluator = fresh_evaluator(dataset, FRESH_SEEDS[0])
    choices = GUIDED.choices(evaluator.backbone)
    means = {name: statistics.fmean(one[name] for one in per_seed) for name in per_seed[0]}
    order = [means[str(site)] for site in choices]
    foretold = {}
    for name, scores in score_sites(evaluator, GUIDED.scores).scores.items():
        values = site_values(scores, choices)
        foretold[name] = spearman([values[site] for site in choices], order)
    best_first = sorted(means, key=lambda name: -means[name])
    first, *others = ([one[str(site)] for site in choices] for one in per_seed)
    if others:
        foretold["one seed, by the mean of the others"] = spearman(
            first, [statistics.fmean(several) for several in zip(*others, strict=True)]
        )
    return {
        "dataset": dataset,
        "metric": evaluator.monitor,
        "parameters": {
            name: count_parameters(evaluator.backbone, one)
            for name, one in _candidates(choices, rate).items()
        },
        "reached": {name: [one[name] for one in per_seed] for name in best_first},
        "spearman": foretold,
    }


def show(row: Mapping[str, Any]) -> None:
    """Print a data set's table."""
    table = Table(title=f"{row['dataset']}: {row['metric']} on the test split, one LoRA of rank 1 alone")
    table.add_column("site")
    table.add_column("trainable parameters", justify="right")
    table.add_column("reached (each seed)", justify="right")
    for name, scores in row["reached"].items():
        table.add_row(name, f"{row['parameters'][name]:,}", " ".join(f"{one:.3f}" for one in scores))
    console = Console(width=100)
    console.print(table)
    for name, value in row["spearman"].items():
        console.print(f"Spearman's correlation with {name}: {value:.2f}")


def main() -> None:
    """Train, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", default=["questions", "spam"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=RATE[1])
    arguments = parser.parse_args()
    seeds = range(FRESH_SEEDS[0], FRESH_SEEDS[0] + arguments.seeds)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {
            dataset: [pool.submit(reached, dataset, seed, arguments.rate) for seed in seeds]
            for dataset in arguments.datasets
        }
        rows = []
        for dataset, several in futures.items():
            rows.append(measure(dataset, [one.result() for one in several], arguments.rate))
            show(rows[-1])
    record = {
        "command": f"python -m benchmarks.lone_adapters --datasets {' '.join(arguments.datasets)} "
        f"--seeds {arguments.seeds} --rate {arguments.rate:g}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, one thread a training",
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
