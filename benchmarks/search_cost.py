"""What a front costs: hypervolume against processor time, for autopeft and for what people do today.

    python -m benchmarks.search_cost [--methods ...] [--dataset questions] [--seeds 3] [--trials 60]

A front's value is what its members give when they are trained again from the start, with seeds that no
search has used (two unless told otherwise), and scored on the test split: never a search's own, optimistic
values. All are trained again alike, in bfloat16 where the processor multiplies it, from random weights; with
`--as-trained` those that a search initialised from the largest LoRA are initialised again from one that is
trained with each fresh seed. A method's front at some moment has the candidates that were done by then and
that no other beats on the validation split. The axes are the metric, from always predicting the majority to
1, and trainable parameters on a log scale over the per-layer space. Each run is a process of its own with
one thread, whose whole processor time counts, imports included; training the front again does not. Runs and
trainings that are done are kept in a folder and not done again: after a change of a method, give another
folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.largest_lora import LargestLora
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.rivals.comparison import FRESH_SEEDS, MOMENTS, Archive, Comparison, end_of
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import EXAMPLES, TRAINING, Entry, Setting

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
HANDWRITTEN = "hand-written loop, TPE"
PAPER = "AutoPEFT paper's protocol"
OURS = "autopeft"
RIVALS = (HANDWRITTEN, PAPER)
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


def train_again(
    dataset: str, candidates: Sequence[tuple[dict[str, Any], bool]], seed: int, folder: Path
) -> list[float]:
    """Train candidates with a fresh seed; return their scores on the test split.

    Args:
        dataset: Name of the data set.
        candidates: Configurations, and whether each is initialised from the largest LoRA.
        seed: The fresh seed.
        folder: Where the largest LoRA is kept.
    """
    evaluator = fresh_evaluator(dataset, seed)
    largest = LargestLora.load(path_of_largest(folder, dataset, seed))
    scores = []
    for data, is_warm in candidates:
        configuration = Configuration.from_dict(data)
        weights = None
        if is_warm:
            assert largest is not None  # trained before
            weights = largest.state(configuration)
        trained = evaluator.train(configuration, initial_weights=weights)
        state = trained.state
        scores.append(
            math.nan if state is None else evaluator.test(configuration, state)[evaluator.monitor.name]
        )
    return scores


def fresh_evaluator(dataset: str, seed: int) -> Evaluator:
    """Return what trains fronts again in this process, with one thread."""
    torch.set_num_threads(1)
    setting = Setting(dataset=dataset, seed=seed, trials=1)
    return setting.evaluator(setting.load(), precision="auto")


def path_of_largest(folder: Path, dataset: str, seed: int) -> Path:
    """Return where the largest LoRA of a fresh seed is kept."""
    return folder / f"largest-{dataset}-{seed}.safetensors"


def train_largest(dataset: str, seed: int, folder: Path) -> None:
    """Train the largest LoRA with a fresh seed, and keep it."""
    evaluator = fresh_evaluator(dataset, seed)
    _, configuration = GUIDED.extremes(evaluator.backbone)
    trained = evaluator.train(configuration)
    if trained.state is None:
        raise RuntimeError(f"The largest LoRA failed: {trained.evaluation.reason}")
    largest = LargestLora(configuration=configuration, tensors=trained.state, cost=trained.evaluation.cost)
    largest.save(path_of_largest(folder, dataset, seed))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw hypervolume against processor time: every seed thin, the median over seeds thick."""
    figure = Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        curves = list(row["curves"].values())
        for curve in curves:
            axes.plot(row["times"], curve, color=f"C{index}", linewidth=0.6, alpha=0.5)
        median = [statistics.median(values) for values in zip(*curves, strict=True)]
        axes.plot(row["times"], median, color=f"C{index}", marker="o", markersize=3, label=row["method"])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(rows[0]["dataset"])
    axes.set_xlabel("CPU-seconds of the whole process")
    axes.set_ylabel("hypervolume of the front, trained again, test split")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table."""
    rivals = {end_of(row["method"]): row for row in rows if row["method"] in RIVALS}
    table = Table(title=f"{rows[0]['dataset']}: CPU-seconds to a level of hypervolume (median over seeds)")
    table.add_column("method")
    for level in rows[0]["seconds_to"]:
        table.add_column(level if level in rivals else f"{level} of the reference", justify="right")
    table.add_column("at the end, of the reference", justify="right")
    table.add_column("CPU-seconds in all", justify="right")
    for row in rows:
        cells = []
        for level, seconds in row["seconds_to"].items():
            cell = "–" if seconds is None else f"{seconds:.0f}"
            rival = rivals.get(level, row)
            cells.append(cell if rival is row else f"{cell} ({ratio(rival, row, level)})")
        table.add_row(row["method"], *cells, f"{row['share_at_end']:.3f}", f"{row['cpu_seconds']:.0f}")
    Console(width=160).print(table)


def ratio(rival: Mapping[str, Any], row: Mapping[str, Any], level: str) -> str:
    """Say how many times a method's processor time to a level the rival takes.

    "> " where the rival never gets there: it took more than all it had.
    """
    own, other = row["seconds_to"][level], rival["seconds_to"][level]
    if own is None:
        return "–"
    return f"> {rival['cpu_seconds'] / own:.1f}×" if other is None else f"{other / own:.1f}×"


def _train_missing(comparison: Comparison, pool: ProcessPoolExecutor, size: int) -> None:
    """Train again everyone on some front who was not yet, a few in one process."""
    archive, dataset, needed = comparison.archive, comparison.dataset, comparison.needed()
    if any(comparison.is_warm(entry) for entry in needed.values()):
        _train_missing_largest(comparison, pool)
    futures: dict[Future[list[float]], tuple[int, list[tuple[str, Entry]]]] = {}
    for seed in comparison.fresh_seeds:
        missing = [
            (key, entry) for key, entry in needed.items() if (dataset, key, seed) not in archive.trainings
        ]
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            candidates = [(entry.configuration, comparison.is_warm(entry)) for _, entry in some]
            futures[pool.submit(train_again, dataset, candidates, seed, archive.folder)] = seed, some
    for count, future in enumerate(as_completed(futures), 1):
        seed, some = futures[future]
        for (key, _), test in zip(some, future.result(), strict=True):
            archive.add_training(dataset, key, seed, test)
        print(f"{dataset}: fronts trained again, {count} of {len(futures)}", flush=True)


def _train_missing_largest(comparison: Comparison, pool: ProcessPoolExecutor) -> None:
    """Train the largest LoRA with the fresh seeds of which it is not kept yet."""
    folder, dataset = comparison.archive.folder, comparison.dataset
    futures = [
        pool.submit(train_largest, dataset, seed, folder)
        for seed in comparison.fresh_seeds
        if not path_of_largest(folder, dataset, seed).exists()
    ]
    for future in futures:
        future.result()


def main() -> None:
    """Run what is missing, train the fronts again, print a table, draw, write JSON."""
    known = methods()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(known), default=[*RIVALS, OURS])
    parser.add_argument("--dataset", default="questions", choices=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument(
        "--our-trials", type=int, default=144, help="of autopeft's variants: most pause early"
    )
    parser.add_argument("--fresh-seeds", type=int, default=len(FRESH_SEEDS), help="of a member of a front")
    parser.add_argument("--as-trained", action="store_true", help="begin again where the search began")
    parser.add_argument("--moments", type=int, default=MOMENTS, help="at which fronts are compared")
    parser.add_argument("--name", help="of the results; the data set's unless given")
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/search_cost"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    archive = Archive(arguments.folder)
    settings = {
        (method, seed): Setting(
            dataset=arguments.dataset,
            seed=seed,
            trials=arguments.our_trials if method.startswith(OURS) else arguments.trials,
        )
        for seed in range(arguments.seeds)
        for method in arguments.methods
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, context, max_tasks_per_child=1) as pool:
        _search_missing(archive, settings, pool)
        runs = {
            key: archive.runs[key[0], setting.dataset, setting.seed, setting.trials]
            for key, setting in settings.items()
        }
        comparison = Comparison(
            arguments.dataset,
            runs,
            archive,
            fresh_seeds=range(FRESH_SEEDS[0], FRESH_SEEDS[0] + arguments.fresh_seeds),
            as_trained=arguments.as_trained,
            count=arguments.moments,
        )
        _train_missing(comparison, pool, size=12)
    rows = comparison.rows([name for name in RIVALS if name in arguments.methods])
    show(rows)
    name = arguments.name or arguments.dataset + "_as_trained" * arguments.as_trained
    draw(rows, PICTURES / f"search_cost_{name}.png")
    record = {
        "command": command(arguments),
        "machine": this_machine("one thread a run", f"{arguments.processes} runs at once"),
        "examples": EXAMPLES,
        "epochs": TRAINING.epochs,
        "reference": comparison.reference(),
        "rows": rows,
    }
    (RESULTS / f"search_cost_{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def command(arguments: argparse.Namespace) -> str:
    """Return what repeats a run; where it keeps its archive is nobody's business."""
    parts = ["python -m benchmarks.search_cost", "--methods", *map(shlex.quote, arguments.methods)]
    for name in ("dataset", "seeds", "trials", "our_trials", "fresh_seeds", "moments"):
        parts += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    if arguments.as_trained:
        parts.append("--as-trained")
    if arguments.name is not None:
        parts += ["--name", shlex.quote(arguments.name)]
    return " ".join(parts)


def _search_missing(
    archive: Archive, settings: Mapping[tuple[str, int], Setting], pool: ProcessPoolExecutor
) -> None:
    """Run the searches that the archive does not have."""
    futures = {
        pool.submit(search, method, setting): (method, setting)
        for (method, _), setting in settings.items()
        if (method, setting.dataset, setting.seed, setting.trials) not in archive.runs
    }
    for count, future in enumerate(as_completed(futures), 1):
        method, setting = futures[future]
        archive.add_run(method, setting, future.result())
        print(f"{count} of {len(futures)}: {method}, {setting.dataset}, {setting.seed}", flush=True)


if __name__ == "__main__":
    main()
