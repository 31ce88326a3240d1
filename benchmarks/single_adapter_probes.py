"""How much does one smallest adapter alone reach at each site, and do scores foretell it?

    python -m benchmarks.single_adapter_probes [--dataset questions] [--seeds 2] [--rate 0.01]

For every site of MiniLM, one LoRA of rank 1 is trained there and nowhere else, beside the head, from random
weights and with a few seeds, and scored on the test split. The table has the sites from the best to the
worst; below it stands Spearman's rank correlation of their means with the scores that `ScoreGuided` goes by,
and of one seed with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_whole
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.site_scoring import score_sites
from autopeft.methods import count_parameters
from autopeft.optimization.candidates import single_adapter_probes
from autopeft.search_spaces.method_choice import Choices
from autopeft.search_spaces.score_allocation import site_values
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.rank_correlation import spearman
from benchmarks.rivals.comparison import FRESH_SEEDS
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import RATE
from benchmarks.search_cost import fresh_evaluator

RESULTS = Path(__file__).parent / "results"
_HEAD = "head alone"
_OTHER_SEEDS = "the mean of the other seeds"


def candidates(choices: Choices, rate: float) -> dict[str, Configuration]:
    """Return the head alone and every lone adapter, by site."""
    found = {_HEAD: Configuration({}, learning_rate=rate)}
    for probe in single_adapter_probes(choices, (), rate):
        ((site, _),) = probe
        found[str(site)] = probe
    return found


def reached(evaluator: Evaluator, configurations: Mapping[str, Configuration]) -> dict[str, float]:
    """Train configurations; return their scores on the test split, the majority's where a training failed."""
    found = {}
    for name, configuration in configurations.items():
        state = evaluator.train(configuration).state
        metric = evaluator.monitor.name
        failed = evaluator.task.trivial_score(metric, evaluator.data)
        found[name] = failed if state is None else evaluator.test(configuration, state)[metric]
    return found


def reached_with(dataset: str, seed: int, rate: float) -> dict[str, float]:
    """Return what the head alone and every lone adapter reach with a seed, in a process of its own."""
    evaluator = fresh_evaluator(dataset, seed)
    return reached(evaluator, candidates(GUIDED.choices(evaluator.backbone), rate))


def correlations(
    per_seed: Sequence[Mapping[str, float]], values: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return Spearman's correlation of what sites reach with what says it before.

    Args:
        per_seed: What each site reached, for each seed.
        values: By score, its value for each site.
    """
    sites = list(next(iter(values.values())))
    means = [statistics.fmean(by_site[site] for by_site in per_seed) for site in sites]
    found = {name: spearman([by_site[site] for site in sites], means) for name, by_site in values.items()}
    first, *others = per_seed
    if others:
        rest = [statistics.fmean(other[site] for other in others) for site in sites]
        found[_OTHER_SEEDS] = spearman([first[site] for site in sites], rest)
    return found


def measure(dataset: str, per_seed: Sequence[Mapping[str, float]], rate: float) -> dict[str, Any]:
    """Return the sites from the best to the worst, and how well what they reach is foretold."""
    evaluator = fresh_evaluator(dataset, FRESH_SEEDS[0])
    choices = GUIDED.choices(evaluator.backbone)
    values = {
        name: {str(site): value for site, value in site_values(scores, choices).items()}
        for name, scores in score_sites(evaluator, GUIDED.scores).items()
    }
    order = sorted(per_seed[0], key=lambda name: -statistics.fmean(by_site[name] for by_site in per_seed))
    known = candidates(choices, rate)
    return {
        "dataset": dataset,
        "metric": evaluator.monitor.name,
        "parameters": {name: count_parameters(evaluator.backbone, known[name]) for name in order},
        "reached": {name: [by_site[name] for by_site in per_seed] for name in order},
        "spearman": correlations(per_seed, values),
    }


def show(row: Mapping[str, Any]) -> None:
    """Print the table and the correlations."""
    table = Table(title=f"{row['dataset']}: {row['metric']} on the test split, one LoRA of rank 1 alone")
    table.add_column("site")
    table.add_column("trainable parameters", justify="right")
    table.add_column("reached (each seed)", justify="right")
    for name, scores in row["reached"].items():
        table.add_row(name, f"{row['parameters'][name]:,}", " ".join(f"{score:.3f}" for score in scores))
    console = Console(width=100)
    console.print(table)
    for name, value in row["spearman"].items():
        console.print(f"Spearman's correlation with {name}: {value:.2f}")


def main() -> None:
    """Train, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="questions", choices=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=RATE[1])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    dataset, count, rate = arguments.dataset, arguments.seeds, arguments.rate
    check_whole("--seeds", count, what="a number of seeds", least=1)
    seeds = range(FRESH_SEEDS[0], FRESH_SEEDS[0] + count)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(reached_with, dataset, seed, rate) for seed in seeds]
        row = measure(dataset, [future.result() for future in futures], rate)
    show(row)
    record = {
        "command": f"python -m benchmarks.single_adapter_probes --dataset {dataset} --seeds {count} "
        f"--rate {rate:g}",
        "machine": this_machine("one thread a training"),
        **row,
    }
    (RESULTS / f"single_adapter_probes_{dataset}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
