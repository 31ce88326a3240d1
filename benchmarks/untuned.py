"""The default search against a uniform LoRA sweep, on a backbone and a data set nothing was tuned on.

    python -m benchmarks.untuned [--seeds 3] [--model dinov2] [--dataset cifar10]

The sweep trains nine uniform LoRA configurations to the end: ranks 2, 8 and 32 on every linear module, each
with three learning rates. The search is given `Search(model, task)` alone, the same training settings and the
processor time of the sweep's trainings. Both fronts are chosen on the validation split and valued on the test
split, by the weights that were trained. The axes are accuracy, from the majority's to 1, and trainable
parameters on a log scale, from the head alone to the sweep's largest. All runs are in one process with one
thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft import Search, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.core.pareto import Axis, hypervolume, non_dominated
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import count_parameters
from autopeft.tasks import ImageClassification, TextClassification
from autopeft.tasks.classification_task import ClassificationTask
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.machine import this_machine
from benchmarks.uniform_lora import uniform

RESULTS = Path(__file__).parent / "results"
RANKS = (2, 8, 32)
RATES = (3e-4, 1e-3, 3e-3)
METRIC, COST = "accuracy", "trainable_parameters"
TRAINING = Training(epochs=3, batch_size=16, validate_every=3, device="cpu")


def classification(dataset: str) -> ClassificationTask:
    """Return a task of few training rows on one of the prepared data sets."""
    (file,) = prepare(dataset).glob(f"{dataset}.*")
    examples: dict[str, Any] = {"train_examples": 256, "validation_examples": 200, "test_examples": 500}
    if file.suffix == ".parquet":
        return ImageClassification(dataset=str(file), **examples)
    return TextClassification(dataset=str(file), max_length=48, **examples)


def compare(model: str, task: ClassificationTask, seed: int) -> dict[str, Any]:
    """Run the sweep, then the search, with one seed."""
    objectives = resolve_objectives((METRIC, COST), task.metrics)
    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            model, task, objectives=(METRIC, COST), training=TRAINING, seed=seed, folder=folder, tracking=None
        )
        opened = search.open()
        backbone, evaluator = opened.backbone, opened.evaluator
        started = time.process_time()
        points = []
        for rank in RANKS:
            for rate in RATES:
                configuration = uniform(backbone, rank, rate)
                trained = evaluator.train(configuration, seed=seed)
                points.append((configuration, trained.evaluation.values, trained.state))
        seconds = time.process_time() - started
        sweep = valued(evaluator, points, objectives)
        print(f"seed {seed}: sweep {seconds:.0f} CPU-s, {sweep}", flush=True)
        started = time.process_time()
        front = search.run(cpu_seconds=seconds, progress=False)
        ours_seconds = time.process_time() - started
        checkpoints = AdapterCheckpoints(search.folder / "adapters")
        members = [(point.configuration, point.values, checkpoints.load(point.record)) for point in front]
        ours = valued(evaluator, members, objectives)
        largest = count_parameters(backbone, uniform(backbone, max(RANKS), RATES[0]))
        axes = (
            Axis(objective=objectives[0], worst=task.trivial_score(METRIC), best=task.best_score(METRIC)),
            Axis(objective=objectives[1], worst=float(largest), best=float(backbone.head_parameters)),
        )
        found = {
            "seed": seed,
            "trials": len(front.records),
            "sweep": {"hypervolume": hypervolume(sweep, axes), "cpu_seconds": seconds, "points": sweep},
            "autopeft": {"hypervolume": hypervolume(ours, axes), "cpu_seconds": ours_seconds, "points": ours},
        }
        print(json.dumps(found), flush=True)
        return found


def valued(evaluator: Evaluator, points: Any, objectives: Any) -> list[dict[str, float]]:
    """Return what the members of a front, chosen in validation, score on the test split."""
    flags = non_dominated([values for _, values, _ in points], objectives)
    return [
        {METRIC: evaluator.test(configuration, state)[METRIC], COST: values[COST]}
        for (configuration, values, state), is_member in zip(points, flags, strict=True)
        if is_member
    ]


def main() -> None:
    """Compare, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="dinov2")
    parser.add_argument("--dataset", default="cifar10")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = classification(arguments.dataset)
    runs = [compare(str(prepare(arguments.model)), task, seed) for seed in range(arguments.seeds)]
    table = Table(
        title=f"{arguments.model}, {arguments.dataset}: hypervolume at the compute of nine trainings"
    )
    for heading in ("", "median", *(f"seed {run['seed']}" for run in runs)):
        table.add_column(heading)
    medians = {}
    for name in ("sweep", "autopeft"):
        values = [run[name]["hypervolume"] for run in runs]
        medians[name] = statistics.median(values)
        table.add_row(name, f"{medians[name]:.3f}", *(f"{value:.3f}" for value in values))
    Console(width=100).print(table)
    record = {
        "command": f"python -m benchmarks.untuned --seeds {arguments.seeds} --model {arguments.model} "
        f"--dataset {arguments.dataset}",
        "machine": this_machine(),
        "medians": medians,
        "runs": runs,
    }
    path = RESULTS / f"untuned_{arguments.model}_{arguments.dataset}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
