"""How many trials does a score-guided search need for the hypervolume of a per-layer search with TPE?

    python -m benchmarks.score_guided [--trials 24] [--seeds 3] [--dataset questions] [--no-baselines]

Both search LoRA ranks of every site of MiniLM on one data set, with the same seeds, training, objectives
and axes of the hypervolume; validation accuracy is what a search sees, and what is compared. The
rival is `PerLayer` with TPE. Searches run one a core, and resume where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft import Search
from autopeft.core.pareto import hypervolume
from autopeft.reporting.front import front_records
from autopeft.search_spaces import PerLayer, ScoreGuided, SearchSpace
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS

RESULTS = Path(__file__).parent / "results"
RATE = (5e-4, 1e-2)
RANKS = (1, 32)
SPACES: dict[str, SearchSpace] = {
    "PerLayer, TPE": PerLayer(methods=("lora",), ranks=RANKS, learning_rate=RATE),
    "ScoreGuided, TPE": ScoreGuided(methods=("lora",), ranks=RANKS, learning_rate=RATE),
}


def run_search(dataset: str, name: str, seed: int, trials: int, baselines: bool, folder: str) -> list[float]:
    """Return the hypervolume after every trial."""
    torch.set_num_threads(1)
    data = DATASETS[dataset]
    search = Search(
        str(prepare("minilm")),
        data.task(train=256, validation=300, test=500),
        SPACES[name],
        objectives=(data.metric, "trainable_parameters", "peak_memory"),
        training=Training(epochs=3, batch_size=16, validate_every=3, device="cpu", precision="32-true"),
        seed=seed,
        baselines=baselines,
        name=f"{name} {seed} {'with' if baselines else 'without'} baselines".replace(",", ""),
        folder=str(Path(folder) / dataset),
        tracking=None,
        score_check=False,
    )
    front = search.run(trials=trials, progress=False)
    return [
        hypervolume(
            [one.evaluation.values for one in front_records(front.records[:count], front.objectives)],
            front.axes,
        )
        for count in range(1, len(front.records) + 1)
    ]


def trials_to(curve: list[float], level: float) -> int | None:
    """Return after how many trials a curve reaches a level; None where it does not."""
    return next((count for count, one in enumerate(curve, 1) if one >= level), None)


def main() -> None:
    """Run the searches, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dataset", choices=tuple(DATASETS), default="questions")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--folder", default="autopeft_runs/score_guided")
    arguments = parser.parse_args()
    baselines = not arguments.no_anchors
    rival, ours = SPACES
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = {
            (name, seed): pool.submit(
                run_search, arguments.dataset, name, seed, arguments.trials, baselines, arguments.folder
            )
            for seed in range(arguments.seeds)
            for name in SPACES
        }
        curves = {key: future.result() for key, future in futures.items()}
    table = Table(
        title=f"{arguments.dataset}: trials to the hypervolume that {rival} has after {arguments.trials}"
    )
    for heading in ("seed", f"hypervolume of {rival}", f"hypervolume of {ours}", "trials needed", "share"):
        table.add_column(heading, justify="right")
    rows: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        level = curves[rival, seed][-1]
        needed = trials_to(curves[ours, seed], level)
        share = None if needed is None else needed / arguments.trials
        rows.append(
            {
                "seed": seed,
                "rival": level,
                "ours": curves[ours, seed][-1],
                "needed": needed,
                "share": share,
            }
        )
        shown = ("–", "–") if needed is None or share is None else (str(needed), f"{share:.2f}")
        table.add_row(str(seed), f"{level:.4f}", f"{curves[ours, seed][-1]:.4f}", *shown)
    console = Console(width=120)
    console.print(table)
    shares = [float("inf") if row["share"] is None else row["share"] for row in rows]
    console.print(f"Median share of the rival's trials: {statistics.median(shares):.2f} (goal: at most 0.5)")
    suffix = "" if baselines else " --no-baselines"
    record = {
        "command": f"python -m benchmarks.score_guided --trials {arguments.trials} "
        f"--seeds {arguments.seeds} --dataset {arguments.dataset}{suffix}",
        "dataset": arguments.dataset,
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "baselines": baselines,
        "rows": rows,
        "median_share": statistics.median(shares),
        "curves": {f"{name}, seed {seed}": curve for (name, seed), curve in curves.items()},
    }
    name = "score_guided" if arguments.dataset == "questions" else f"score_guided_{arguments.dataset}"
    path = RESULTS / f"{name}{'' if baselines else '_without_anchors'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
