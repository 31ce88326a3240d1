"""A language model through the default strategy, against the untrained model and uniform LoRA of rank 8.

    python -m benchmarks.language_model [--config configs/dialogue.yaml] [--folder FOLDER]

The search runs in a process of its own, so that its peak resident memory can be read: it is to keep below
2.5 times the weights and the activations that were counted, of training or of scoring. Uniform LoRA of rank 8
on query and value is trained for the same steps with three learning rates, the best of them in validation
with three seeds. Both, and the untrained model, are scored on the test split; the best point of the front by
the weights that the search kept. Every trained point of the front is exported, loaded in a fresh process (by
plain peft, where the folder is a plain one) and scored there on the same test rows. The same call goes on
where it was stopped; the memory of a search that was stopped is not known.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Configuration, ParetoFront, Search
from autopeft.core.durable_files import load_json, save_json
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.tasks import CausalLM
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.yaml_config import load_config
from benchmarks.fresh_loss import LossJob, fresh_loss
from benchmarks.machine import this_machine
from benchmarks.resident import searched
from benchmarks.uniform_lora import uniform

RESULTS = Path(__file__).parent / "results"
RANK = 8
_PLACE = "query and value"
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)


def trained(evaluator: Evaluator, configuration: Configuration, seed: int) -> tuple[float, float]:
    """Train a configuration; return its loss in validation and on the test split."""
    found = evaluator.train(configuration, seed)
    if found.state is None:
        raise RuntimeError(f"{configuration} failed: {found.evaluation.reason}")
    return found.evaluation.values["loss"], evaluator.test(configuration, found.state)["loss"]


def uniform_losses(evaluator: Evaluator, backbone: Backbone) -> dict[str, Any]:
    """Train uniform LoRA with every learning rate, the best with every seed."""
    first, *seeds = SEEDS
    by_rate = {rate: trained(evaluator, uniform(backbone, RANK, rate, _PLACE), first) for rate in RATES}
    rate = min(by_rate, key=lambda rate: by_rate[rate][0])
    best = uniform(backbone, RANK, rate, _PLACE)
    runs = [by_rate[rate], *(trained(evaluator, best, seed) for seed in seeds)]
    validation, test = zip(*runs, strict=True)
    return {
        "learning_rate": rate,
        "trainable_parameters": evaluator.costs(best)["trainable_parameters"],
        "validation_losses_by_rate": {str(rate): losses[0] for rate, losses in by_rate.items()},
        "validation_losses": validation,
        "test_losses": test,
    }


def exported(search: Search, front: ParetoFront, folder: Path) -> list[dict[str, Any]]:
    """Export every trained point of the front; return its test loss here and in a fresh process."""
    opened = search.open()
    checkpoints = AdapterCheckpoints(search.folder / "adapters")
    dtype = str(next(opened.backbone.model.parameters()).dtype).removeprefix("torch.")
    rows = []
    for point in front:
        if not len(point.configuration):
            continue  # the untrained model is the base itself
        kept = folder / f"{point.number}.json"
        row = load_json(kept)
        if row is not None and row["values"] == point.values:
            rows.append(row)
            continue
        report = point.export(folder / str(point.number), overwrite=True)
        state = checkpoints.load(point.record)
        assert state is not None  # members of the front keep their tensors
        batches = list(opened.evaluator.data.test_dataloader())
        job = LossJob(base=str(search.backbone), dtype=dtype, folder=str(folder / str(point.number)))
        rows.append(
            {
                "trial": point.number,
                "values": point.values,
                "check": report.checked,
                "test_loss": opened.evaluator.test(point.configuration, state)["loss"],
                "test_loss_in_fresh_process": fresh_loss(job, batches),
            }
        )
        save_json(kept, rows[-1])
    return rows


def main() -> None:
    """Search, compare, export; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/dialogue.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/language_model"))
    arguments = parser.parse_args()
    own = [f"folder={arguments.folder}", "tracking=null"]
    resident = searched(arguments.config, arguments.folder)
    search = load_config(arguments.config, own).search
    assert isinstance(search.task, CausalLM)
    front, opened = search.front(), search.open()
    points = exported(search, front, arguments.folder / "exports")
    untrained = opened.evaluator.test(Configuration({}, learning_rate=RATES[0]), {})["loss"]
    found = uniform_losses(opened.evaluator, opened.backbone)
    best = next(row for row in points if row["trial"] == front.best().number)
    table = Table(title=f"{search.name}: {len(front.records)} trials, a front of {len(front)}")
    for heading in ("", "parameters", "loss in validation", "on the test split"):
        table.add_column(heading)
    table.add_row("untrained", "0", "", f"{untrained:.4f}")
    table.add_row(
        f"uniform LoRA, r = {RANK}, rate {found['learning_rate']:g}",
        f"{found['trainable_parameters']:,.0f}",
        " ".join(f"{loss:.4f}" for loss in found["validation_losses"]),
        f"{statistics.mean(found['test_losses']):.4f} (mean of {len(SEEDS)} seeds)",
    )
    table.add_row(
        f"autopeft, trial {best['trial']}",
        f"{best['values']['trainable_parameters']:,.0f}",
        f"{best['values']['loss']:.4f} (mean of the search's seeds)",
        f"{best['test_loss']:.4f}",
    )
    Console(width=120).print(table)
    difference = max(abs(row["test_loss"] - row["test_loss_in_fresh_process"]) for row in points)
    print(f"Largest difference of a test loss in a fresh process: {difference:.1e}.")
    record = {
        "command": f"python -m benchmarks.language_model --config {arguments.config}",
        "machine": this_machine(),
        "trials": len(front.records),
        "front": len(front),
        "memory": None if resident is None else resident.record(),
        "untrained_test_loss": untrained,
        "uniform": found,
        "points": points,
    }
    path = RESULTS / f"language_model_{arguments.config.stem}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
