"""How many trials does a search need for the hypervolume of `PerLayer` with TPE, by space and sampler?

    python -m benchmarks.score_guided [--trials 24] [--seeds 3] [--dataset questions] [--no-baselines]

All search LoRA ranks of every site of MiniLM on one data set, with the same seeds, training, objectives
and axes of the hypervolume; validation accuracy is what a search sees, and what is compared. Spaces and
samplers are crossed, so that what comes from either can be told. The rival is `PerLayer` with TPE. Searches
run one a core, and resume where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft import Search
from autopeft.core.pareto import front_records, hypervolume
from autopeft.search_spaces import PerLayer, ScoreGuided, SearchSpace
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results"
RATE = (5e-4, 1e-2)
RANKS = (1, 32)
_PER_LAYER = PerLayer(methods=("lora",), sizes={"rank": RANKS}, learning_rate=RATE)
_GUIDED = ScoreGuided(methods=("lora",), sizes={"rank": RANKS}, learning_rate=RATE)
SEARCHES: dict[str, tuple[SearchSpace, str]] = {
    "PerLayer, TPE": (_PER_LAYER, "tpe"),
    "PerLayer, EHVI": (_PER_LAYER, "ehvi"),
    "ScoreGuided, TPE": (_GUIDED, "tpe"),
    "ScoreGuided, EHVI": (_GUIDED, "ehvi"),
}


def run_search(dataset: str, name: str, seed: int, trials: int, baselines: bool, folder: str) -> list[float]:
    """Return the hypervolume after every trial."""
    torch.set_num_threads(1)
    data = DATASETS[dataset]
    space, sampler = SEARCHES[name]
    search = Search(
        str(prepare("minilm")),
        data.task(train=256, validation=300, test=500),
        space,
        sampler=sampler,
        objectives=(data.metric, "trainable_parameters", "peak_memory"),
        training=Training(epochs=3, batch_size=16, validate_every=3, device="cpu", precision="32-true"),
        halving=None,
        seed=seed,
        seeds=1,
        baselines=baselines,
        name=f"{name} {seed} {'with' if baselines else 'without'} baselines".replace(",", ""),
        folder=str(Path(folder) / dataset),
        tracking=None,
    )
    front = search.run(trials=trials, progress=False)
    return [
        hypervolume(
            [record.evaluation.values for record in front_records(front.records[:count], front.objectives)],
            front.axes,
        )
        for count in range(1, len(front.records) + 1)
    ]


def trials_to(curve: list[float], level: float) -> int | None:
    """Return after how many trials a curve reaches a level; None where it does not."""
    return next((count for count, value in enumerate(curve, 1) if value >= level), None)


def main() -> None:
    """Run the searches, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dataset", choices=tuple(DATASETS), default="questions")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--folder", default="autopeft_runs/score_guided")
    arguments = parser.parse_args()
    baselines = not arguments.no_baselines
    rival, *others = SEARCHES
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = {
            (name, seed): pool.submit(
                run_search, arguments.dataset, name, seed, arguments.trials, baselines, arguments.folder
            )
            for seed in range(arguments.seeds)
            for name in SEARCHES
        }
        curves = {key: future.result() for key, future in futures.items()}
    table = Table(
        title=f"{arguments.dataset}: trials to the hypervolume that {rival} has after {arguments.trials}"
    )
    for heading in ("search", "seed", f"hypervolume of {rival}", "its own", "trials needed", "share"):
        table.add_column(heading, justify="right")
    rows: list[dict[str, Any]] = []
    for name in others:
        for seed in range(arguments.seeds):
            level, reached = curves[rival, seed][-1], curves[name, seed][-1]
            needed = trials_to(curves[name, seed], level)
            share = None if needed is None else needed / arguments.trials
            rows.append(
                {
                    "search": name,
                    "seed": seed,
                    "rival": level,
                    "reached": reached,
                    "needed": needed,
                    "share": share,
                }
            )
            shown = ("–", "–") if needed is None or share is None else (str(needed), f"{share:.2f}")
            table.add_row(name, str(seed), f"{level:.4f}", f"{reached:.4f}", *shown)
    console = Console(width=120)
    console.print(table)
    medians = {
        name: statistics.median(
            float("inf") if row["share"] is None else row["share"] for row in rows if row["search"] == name
        )
        for name in others
    }
    for name, median in medians.items():
        console.print(f"{name}: median share of the rival's trials {median:.2f}")
    suffix = "" if baselines else " --no-baselines"
    record = {
        "command": f"python -m benchmarks.score_guided --trials {arguments.trials} "
        f"--seeds {arguments.seeds} --dataset {arguments.dataset}{suffix}",
        "dataset": arguments.dataset,
        "machine": this_machine(),
        "baselines": baselines,
        "rows": rows,
        "median_shares": medians,
        "curves": {f"{name}, seed {seed}": curve for (name, seed), curve in curves.items()},
    }
    name = "score_guided" if arguments.dataset == "questions" else f"score_guided_{arguments.dataset}"
    path = RESULTS / f"{name}{'' if baselines else '_without_baselines'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
