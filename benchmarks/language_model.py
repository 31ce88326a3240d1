"""A language model through the default strategy, against the untrained model and uniform LoRA of rank 8.

    python -m benchmarks.language_model [--config configs/dialogue.yaml] [--folder FOLDER]

The search runs in a process of its own, as the command line runs it, so that its peak resident memory can be
read. Uniform LoRA of rank 8 on query and value is trained for the same steps with three learning rates; the
best of them in validation, and the best point of the front, are trained with three seeds and scored on the
test split. Every point of the front is exported, loaded in a fresh process (by plain peft, where the folder
is a plain one) and scored there on the same test rows. The same call goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Adapter, Configuration, ParetoFront, Search
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.tasks import CausalLM
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.yaml_config import load_config
from benchmarks.fresh_loss import LossJob, fresh_loss

RESULTS = Path(__file__).parent / "results"
RANK = 8
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)


def uniform(backbone: Backbone, rate: float) -> Configuration:
    """Return LoRA of one rank on query and value of every block."""
    sites = {site: Adapter("lora", RANK) for site in backbone.sites if site.role in ("query", "value")}
    return Configuration(sites, learning_rate=rate)


def searched(config: Path, folder: Path) -> float:
    """Run the search in a process of its own; return its peak resident memory in bytes."""
    program = Path(sys.executable).with_name("autopeft")
    command = [str(program), "search", str(config), f"folder={folder}", "tracking=null"]
    subprocess.run(command, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0


def tested(evaluator: Evaluator, configuration: Configuration) -> dict[str, Any]:
    """Train a configuration with each seed; return what it scores in validation and test."""
    runs = []
    for seed in SEEDS:
        trained = evaluator.train(configuration, seed)
        if trained.state is None:
            raise RuntimeError(f"{configuration} failed: {trained.evaluation.reason}")
        runs.append((trained.evaluation.values["loss"], evaluator.test(configuration, trained.state)["loss"]))
    validation, test = zip(*runs, strict=True)
    return {
        "learning_rate": configuration.learning_rate,
        "trainable_parameters": evaluator.costs(configuration)["trainable_parameters"],
        "validation_loss": validation,
        "test_loss": test,
    }


def best_rate(evaluator: Evaluator, backbone: Backbone) -> Configuration:
    """Return uniform LoRA with the learning rate that has the lowest validation loss."""
    losses = {}
    for rate in RATES:
        configuration = uniform(backbone, rate)
        losses[configuration] = evaluator.train(configuration).evaluation.values.get("loss", float("inf"))
    return min(losses, key=lambda configuration: losses[configuration])


def exported(search: Search, front: ParetoFront, folder: Path) -> list[dict[str, Any]]:
    """Export every trained point of the front; return its test loss here and in a fresh process."""
    opened = search.open()
    checkpoints = AdapterCheckpoints(search.folder / "adapters")
    rows = []
    for point in front:
        if not len(point.configuration):
            continue  # the untrained model is the base itself
        report = point.export(folder / str(point.number), overwrite=True)
        state = checkpoints.load(point.number)
        assert state is not None  # members of the front keep their tensors
        batches = list(opened.evaluator.data.test_dataloader())
        job = LossJob(base=str(search.backbone), folder=str(folder / str(point.number)))
        rows.append(
            {
                "trial": point.number,
                "values": point.values,
                "check": str(report.check),
                "test_loss": opened.evaluator.test(point.configuration, state)["loss"],
                "test_loss_in_fresh_process": fresh_loss(job, batches),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Search, compare, export; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/dialogue.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/language_model"))
    arguments = parser.parse_args()
    memory = searched(arguments.config, arguments.folder)
    search = load_config(arguments.config, [f"folder={arguments.folder}", "tracking=null"]).search
    assert isinstance(search.task, CausalLM)
    front, opened = search.front(), search.open()
    weights = sum(tensor.nbytes for tensor in opened.backbone.model.parameters())
    completed = [record for record in front.records if record.evaluation.status == "complete"]
    counted = max(record.evaluation.values["peak_memory"] for record in completed)
    untrained = Configuration({}, learning_rate=RATES[0])
    results: dict[str, Any] = {
        "untrained": opened.evaluator.test(untrained, {})["loss"],
        "uniform": tested(opened.evaluator, best_rate(opened.evaluator, opened.backbone)),
        "autopeft": tested(opened.evaluator, front.best().configuration),
    }
    points = exported(search, front, arguments.folder / "exports")
    table = Table(title=f"{search.name}: {len(front.records)} trials, a front of {len(front)}")
    for heading in ("", "parameters", "test loss of three seeds", "mean"):
        table.add_column(heading)
    table.add_row("untrained", "0", "", f"{results['untrained']:.4f}")
    for name in ("uniform", "autopeft"):
        losses = results[name]["test_loss"]
        table.add_row(
            name,
            f"{results[name]['trainable_parameters']:,.0f}",
            " ".join(f"{loss:.4f}" for loss in losses),
            f"{statistics.mean(losses):.4f}",
        )
    Console(width=100).print(table)
    difference = max(abs(row["test_loss"] - row["test_loss_in_fresh_process"]) for row in points)
    print(f"Peak resident memory of the search: {memory / 2**30:.2f} GiB; weights {weights / 2**30:.2f} GiB,")
    print(f"largest counted peak (weights included) {counted / 2**30:.2f} GiB.")
    print(f"Largest difference of a test loss in a fresh process: {difference:.1e}.")
    record = {
        "command": f"python -m benchmarks.language_model --config {arguments.config}",
        "machine": platform.platform(),
        "trials": len(front.records),
        "front": len(front),
        "peak_resident_bytes": memory,
        "weight_bytes": weights,
        "largest_counted_bytes": counted,
        **results,
        "points": points,
    }
    path = RESULTS / f"language_model_{arguments.config.stem}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
