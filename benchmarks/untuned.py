"""The default search against a uniform LoRA sweep, on a backbone and a data set nothing was tuned on.

    python -m benchmarks.untuned [--seeds 3] [--model dinov2] [--dataset cifar10] [--again]

The sweep trains the head alone and nine uniform LoRA configurations to the end: ranks 2, 8 and 32 on every
linear module, each with three learning rates. The search is given `Search(model, task)` alone, the same
training settings and the processor time of the sweep's trainings. Both fronts are chosen on the validation
split and valued on the test split, by the weights that were trained. The axes are accuracy, from the
majority's to 1, and trainable parameters on a log scale, from the head alone to the sweep's largest. All runs
are in one process with one thread. With --again, figures are computed from the result file, and nothing is
trained.
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
from autopeft.core.configuration import Configuration
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
        heads = [Configuration(learning_rate=rate) for rate in RATES]
        adapted = [uniform(backbone, rank, rate) for rank in RANKS for rate in RATES]
        trained = {each: evaluator.train(each, seed=seed) for each in (*heads, *adapted)}
        seconds = time.process_time() - started
        head, sweep = (
            valued(
                evaluator,
                [(each, trained[each].evaluation.values, trained[each].state) for each in several],
                objectives,
            )
            for several in (heads, adapted)
        )
        print(f"seed {seed}: sweep {seconds:.0f} CPU-s, {sweep}", flush=True)
        started = time.process_time()
        front = search.run(cpu_seconds=seconds, progress=False)
        ours_seconds = time.process_time() - started
        checkpoints = AdapterCheckpoints(search.folder / "adapters")
        members = [(point.configuration, point.values, checkpoints.load(point.record)) for point in front]
        ours = valued(evaluator, members, objectives)
        largest = count_parameters(backbone, uniform(backbone, max(RANKS), RATES[0]))
        found = {
            "seed": seed,
            "trials": len(front.records),
            "parameters": [backbone.head_parameters, largest],
            "head alone": {"points": head},
            "sweep": {"cpu_seconds": seconds, "points": sweep},
            "autopeft": {"cpu_seconds": ours_seconds, "points": ours},
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


def hypervolumes(run: dict[str, Any], task: ClassificationTask) -> dict[str, float]:
    """Return the hypervolume of each method, of the head alone, and of that with the sweep."""
    head, largest = map(float, run["parameters"])
    accuracy, parameters = resolve_objectives((METRIC, COST), task.metrics)
    axes = (
        Axis(objective=accuracy, worst=task.trivial_score(METRIC), best=task.best_score(METRIC)),
        Axis(objective=parameters, worst=largest, best=head),
    )
    alone, sweep, ours = (run[name]["points"] for name in ("head alone", "sweep", "autopeft"))
    fronts = {
        "sweep": sweep,
        "head alone": alone,
        "head alone and sweep": [*alone, *sweep],
        "autopeft": ours,
    }
    return {name: hypervolume(points, axes) for name, points in fronts.items()}


def main() -> None:
    """Compare, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="dinov2")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--again", action="store_true", help="compute from the result file, train nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = classification(arguments.dataset)
    path = RESULTS / f"untuned_{arguments.model}_{arguments.dataset}.json"
    if arguments.again:
        record = json.loads(path.read_text())
    else:
        record = {
            "command": f"python -m benchmarks.untuned --seeds {arguments.seeds} --model {arguments.model} "
            f"--dataset {arguments.dataset}",
            "machine": this_machine(),
            "runs": [compare(str(prepare(arguments.model)), task, seed) for seed in range(arguments.seeds)],
        }
    found = [hypervolumes(run, task) for run in record["runs"]]
    table = Table(title=f"{arguments.model}, {arguments.dataset}: hypervolume at the compute of the sweep")
    for heading in ("", "median", *(f"seed {run['seed']}" for run in record["runs"])):
        table.add_column(heading)
    record["medians"] = {}
    for name in found[0]:
        values = [each[name] for each in found]
        record["medians"][name] = median = statistics.median(values)
        table.add_row(name, f"{median:.3f}", *(f"{value:.3f}" for value in values))
    Console(width=100).print(table)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
