"""What ladder side-tuning takes and reaches, beside LoRA of rank 8 on all linear layers.

    python -m benchmarks.ladder [--parts memory questions spam dialogue] [--adapters ladder lora]

Peak memory is counted on the models, data and batches of the two demos. Accuracy is of the demos' trainings,
with three or four learning rates of the configuration, of which a ladder is trained at its own multiple;
validation and test split. Each result is written as soon as it is there, and no training is repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from autopeft import Adapter, Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.tasks import Task
from autopeft.training.settings import Training
from autopeft.yaml_config import load_config
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "ladder.json"
DEMOS = {"dialogue": Path("configs/dialogue.yaml"), "questions": Path("configs/demo.yaml")}
ADAPTERS = {"lora": Adapter("lora", 8), "ladder": Adapter("ladder", 16), "wide ladder": Adapter("ladder", 64)}
RATES = {"questions": (3e-3, 1e-2, 1e-3), "spam": (3e-3, 1e-2, 1e-3, 3e-4), "dialogue": (3e-3,)}
KINDS = {"lora": "linear", "ladder": "block"}


def evaluator(name: str) -> Evaluator:
    """Return what trains on a data set as a demo does."""
    search = load_config(DEMOS.get(name, DEMOS["questions"]), ["tracking=null"]).search
    task: Task = search.task
    if name == "spam":
        task = DATASETS["spam"].task(train=1024, validation=500, test=500)
    backbone = Backbone.load(str(search.backbone), task.head, options=search.loading)
    costs = ("trainable_parameters", "peak_memory")
    metric = "accuracy" if name != "dialogue" else "loss"
    training: Training = search.training
    return Evaluator(backbone, task, training, resolve_objectives((metric, *costs), task.objectives))


def placed(backbone: Backbone, adapter: Adapter, lowest: int = 0, rate: float = 1e-3) -> Configuration:
    """Return an adapter at all its sites from a block on."""
    sites = [site for site, shape in backbone.sites.items() if shape.kind == KINDS[adapter.method]]
    chosen = {site: adapter for site in sites if site.block >= lowest}
    return Configuration(chosen, learning_rate=rate)


def memory(name: str) -> None:
    """Count every adapter at all blocks, and LoRA at the top block alone."""
    bench = evaluator(name)
    top = len(bench.backbone.places) - 1
    cases = {label: placed(bench.backbone, adapter) for label, adapter in ADAPTERS.items()}
    cases["lora, top block"] = placed(bench.backbone, ADAPTERS["lora"], top)
    for label, configuration in cases.items():
        keep(f"memory, {name}, {label}", bench.costs(configuration))


def trainings(name: str, methods: list[str]) -> None:
    """Train with every learning rate what is not there yet."""
    known = results()
    cases = {f"{name}, {label}, {rate:g}": (label, rate) for label in methods for rate in RATES[name]}
    missing = {key: case for key, case in cases.items() if key not in known}
    if not missing:
        return
    bench = evaluator(name)
    for key, (label, rate) in missing.items():
        configuration = placed(bench.backbone, ADAPTERS[label], rate=rate)
        trained = bench.train(configuration)
        assert trained.state is not None, trained.evaluation.reason
        values, metric = trained.evaluation.values, bench.monitor.name
        test = bench.test(configuration, trained.state)[metric]
        parameters = values["trainable_parameters"]
        keep(key, {"validation": values[metric], "test": test, "trainable_parameters": parameters})


def results() -> dict[str, dict[str, float]]:
    """Return what is there."""
    found: dict[str, dict[str, float]] = {}
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())["results"]
    return found


def keep(key: str, values: dict[str, float]) -> None:
    """Print a result and write it beside the others."""
    print(key, values, flush=True)
    found = {**results(), key: values}
    record = {"command": "python -m benchmarks.ladder", "machine": this_machine(), "results": found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("memory", "questions", "spam", "dialogue")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=["ladder", "lora"])
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part == "memory":
            for name in DEMOS:
                memory(name)
        else:
            trainings(part, arguments.adapters)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
