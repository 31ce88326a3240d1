"""What a front costs: hypervolume against processor time, for autopeft and for what people do today.

    python -m benchmarks.search_cost [--methods ...] [--datasets questions spam] [--seeds 3] [--trials 24]

A front's value is what its members give when they are trained again from the start, with a seed that no
search has used, and scored on the test split: never a search's own, optimistic values. A method's front at
some moment has the candidates that were done by then and that nobody beats on the validation split. The axes
are the metric, from always predicting the majority to 1, and trainable parameters on a log scale over the
per-layer space. Each run is a process of its own with one thread, whose whole processor time counts, imports
included; training the front again does not. Runs and trainings that are done are kept in a folder and not
done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from autopeft.configuration import Configuration
from benchmarks.rivals.comparison import FRESH_SEEDS, SHARES, Archive, Comparison
from benchmarks.rivals.setting import EXAMPLES, TRAINING, Entry, Setting

RESULTS = Path(__file__).parent / "results" / "search_cost.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "search_cost.png"
HANDWRITTEN = "hand-written loop, TPE"
PAPER = "AutoPEFT paper's protocol"
OURS = "autopeft"
_NEEDS = {PAPER: ("optuna_integration", "botorch"), "Syne Tune's MO-ASHA": ("syne_tune", "syne-tune")}


def methods() -> dict[str, Callable[[Setting], list[Entry]]]:
    """Return by name what runs a search, of those whose packages are installed."""
    from benchmarks.rivals import handwritten, mo_asha, ours

    found: dict[str, Callable[[Setting], list[Entry]]] = {
        HANDWRITTEN: partial(handwritten.run, sampler="tpe"),
        "hand-written loop, NSGA-II": partial(handwritten.run, sampler="nsga2"),
        "hand-written loop, random": partial(handwritten.run, sampler="random"),
        "Syne Tune's MO-ASHA": mo_asha.run,
        PAPER: _paper,
        **{name: partial(ours.run, variant=name) for name in ours.VARIANTS},
    }
    for name, (module, package) in _NEEDS.items():
        if importlib.util.find_spec(module) is None:
            print(f"Left out: {name}, which needs `pip install {package}`.")
            del found[name]
    return found


def _paper(setting: Setting) -> list[Entry]:
    from benchmarks.rivals import autopeft_paper  # imports botorch

    return autopeft_paper.run(setting)


def search(method: str, setting: Setting) -> list[Entry]:
    """Run one search in this process."""
    torch.set_num_threads(1)
    return methods()[method](setting)


def train_again(dataset: str, configurations: Sequence[dict[str, Any]], seed: int) -> list[float]:
    """Train configurations with a fresh seed; return their scores on the test split."""
    torch.set_num_threads(1)
    setting = Setting(dataset=dataset, seed=seed, trials=1)
    evaluator = setting.evaluator(setting.load())
    scores = []
    for data in configurations:
        configuration = Configuration.from_dict(data)
        trained = evaluator.train(configuration)
        state = trained.state
        scores.append(math.nan if state is None else evaluator.test(configuration, state)[setting.metric])
    return scores


def draw(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw hypervolume against processor time, a panel a data set: the median over seeds."""
    figure = Figure(figsize=(6.4 * len(tables), 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (dataset, rows) in zip(panels, tables.items(), strict=True):
        for row in rows:
            curves = list(row["curves"].values())
            median = [statistics.median(values) for values in zip(*curves, strict=True)]
            axes.plot(row["times"], median, marker="o", markersize=3, label=row["method"])
        axes.set_xscale("log")
        axes.set_title(dataset)
        axes.set_xlabel("CPU-seconds of the whole process")
        axes.set_ylabel("hypervolume of the front, trained again, test split")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)


def show(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print a table a data set."""
    for dataset, rows in tables.items():
        by_name = {row["method"]: row for row in rows}
        table = Table(
            title=f"{dataset}: CPU-seconds to a share of the reference hypervolume (median over seeds)"
        )
        table.add_column("method")
        headings = [f"{share:.0%}" for share in SHARES]
        for heading in (*headings, "at the end", "CPU-seconds", f"{HANDWRITTEN}: times"):
            table.add_column(heading, justify="right")
        for row in rows:
            cells = ["–" if row[f"to_{one}"] is None else f"{row[f'to_{one}']:.0f}" for one in headings]
            table.add_row(
                row["method"],
                *cells,
                f"{row['share_at_end']:.3f}",
                f"{row['cpu_seconds']:.0f}",
                ratio(by_name.get(HANDWRITTEN), row),
            )
        Console(width=140).print(table)


def ratio(rival: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    """Say how many times the rival's processor time to 95 % is the row's; "> " where it never gets there."""
    own = row["to_95%"]
    if rival is None or own is None:
        return "–"
    other = rival["to_95%"]
    return f"> {rival['cpu_seconds'] / own:.1f}" if other is None else f"{other / own:.1f}"


def _train_missing(comparison: Comparison, pool: ProcessPoolExecutor, size: int) -> None:
    """Train again everyone on some front who was not yet, a few in one process."""
    archive, dataset = comparison.archive, comparison.dataset
    futures: dict[Future[list[float]], tuple[int, list[tuple[str, Entry]]]] = {}
    for seed in FRESH_SEEDS:
        missing = [
            (key, one)
            for key, one in comparison.needed().items()
            if (dataset, key, seed) not in archive.trainings
        ]
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            data = [one.configuration for _, one in some]
            futures[pool.submit(train_again, dataset, data, seed)] = seed, some
    for count, future in enumerate(as_completed(futures), 1):
        seed, some = futures[future]
        for (key, _), test in zip(some, future.result(), strict=True):
            archive.add_training(dataset, key, seed, test)
        print(f"{dataset}: fronts trained again, {count} of {len(futures)}", flush=True)


def main() -> None:
    """Run what is missing, train the fronts again, print tables, draw, write JSON."""
    known = methods()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--datasets", nargs="+", default=["questions", "spam"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--our-trials", type=int, default=48, help="of autopeft's variants: most pause early")
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/search_cost"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    archive = Archive(arguments.folder)
    context = multiprocessing.get_context("spawn")

    def trials(method: str) -> int:
        return int(arguments.our_trials if method.startswith(OURS) else arguments.trials)

    with ProcessPoolExecutor(arguments.processes, context, max_tasks_per_child=1) as pool:
        futures = {}
        for dataset in arguments.datasets:
            for seed in range(arguments.seeds):
                for method in arguments.methods:
                    setting = Setting(dataset=dataset, seed=seed, trials=trials(method))
                    if (method, dataset, seed, setting.trials) not in archive.runs:
                        futures[pool.submit(search, method, setting)] = method, setting
        for count, future in enumerate(as_completed(futures), 1):
            method, setting = futures[future]
            archive.add_run(method, setting, future.result())
            print(f"{count} of {len(futures)}: {method}, {setting.dataset}, {setting.seed}", flush=True)
        tables = {}
        for dataset in arguments.datasets:
            runs = {
                (method, seed): archive.runs[method, dataset, seed, trials(method)]
                for method in arguments.methods
                for seed in range(arguments.seeds)
            }
            comparison = Comparison(dataset, runs, archive)
            _train_missing(comparison, pool, size=12)
            tables[dataset] = comparison.rows()
    show(tables)
    draw(tables)
    record = {
        "command": f"python -m benchmarks.search_cost --seeds {arguments.seeds} --trials {arguments.trials} "
        f"--our-trials {arguments.our_trials}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, one thread a run",
        "examples": EXAMPLES,
        "epochs": TRAINING.epochs,
        "tables": tables,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
