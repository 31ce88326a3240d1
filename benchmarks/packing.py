"""What a trial costs in a pack, against the same trial trained alone, and up to which size packs pay.

    python -m benchmarks.packing [--steps 16] [--repeats 2] [--device auto]

LoRA on MiniLM and question classification, batch size 32, validation included: of rank 8 at all linear
modules, at those of the top half of the blocks, at query and value of the top third, and at random sites with
random ranks. Packs of 2, 4 and 8 trials (`PackedTrainer`) take turns with the same trials alone
(`Evaluator.train`) in one run. On the CPU, processor seconds of the process, which other work on the machine
does not count into; on CUDA, elapsed seconds. The least of the repeats counts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.models.backbone import Backbone
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "packing.json"
BATCH_SIZE = 32
SIZES = (2, 4, 8)
PAYING = 1.05  # a doubling of the pack pays if it takes this factor off a trial's seconds
_LINEAR = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
PLACES: Mapping[str, tuple[str, Sequence[str]]] = {
    "all linear modules": ("0-5", _LINEAR),
    "linear modules of the top half": ("3-5", _LINEAR),
    "query, value of the top third": ("4-5", ("query", "value")),
}
AT_RANDOM = "sites and ranks at random"


def configurations_at(place: str, backbone: Backbone) -> list[Configuration]:
    """Return as many configurations as the largest pack has, with different learning rates."""
    rates = [1e-3 * (1 + index / 4) for index in range(max(SIZES))]
    if place in PLACES:
        blocks, roles = PLACES[place]
        sites = {f"{blocks}.{role}": {"method": "lora", "size": 8} for role in roles}
        return [Configuration.from_dict({"learning_rate": rate, "sites": sites}) for rate in rates]
    draw = random.Random(0)
    sites_of = [site for site in backbone.sites if site.role in _LINEAR]
    found = []
    for rate in rates:
        lowest, share = draw.randrange(len(backbone.blocks)), draw.uniform(0.2, 1.0)
        chosen = [site for site in sites_of if site.block >= lowest and draw.random() < share]
        ranks = {str(site): {"method": "lora", "size": draw.choice((1, 4, 16))} for site in chosen}
        found.append(Configuration.from_dict({"learning_rate": rate, "sites": ranks}))
    return found


def seconds_of(evaluator: Evaluator, work: Callable[[], Sequence[Evaluation]]) -> float:
    """Return what a piece of work takes."""
    clock = time.perf_counter if evaluator.device.type == "cuda" else time.process_time
    started = clock()
    for evaluation in work():
        assert evaluation.status == "complete", evaluation.reason
    return clock() - started


def measure(evaluator: Evaluator, place: str, repeats: int) -> dict[str, Any]:
    """Train the same configurations alone and in packs of all sizes, in turn."""
    trainer, configurations = PackedTrainer(evaluator), configurations_at(place, evaluator.backbone)

    def alone() -> list[Evaluation]:
        return [evaluator.evaluate(configuration) for configuration in configurations]

    def packed(size: int) -> list[Evaluation]:
        packs = [configurations[start : start + size] for start in range(0, len(configurations), size)]
        return [trained.evaluation for pack in packs for trained in trainer.train(pack)]

    seconds: dict[int, list[float]] = {}
    for _ in range(repeats):
        seconds.setdefault(1, []).append(seconds_of(evaluator, alone))
        for size in SIZES:
            seconds.setdefault(size, []).append(seconds_of(evaluator, partial(packed, size)))
    least = {size: min(values) / len(configurations) for size, values in seconds.items()}
    paying = 1
    for size in SIZES:
        if least[paying] / least[size] < PAYING:
            break
        paying = size
    gains = {str(size): least[1] / least[size] for size in SIZES}
    return {"place": place, "seconds_a_trial": least, "gain": gains, "pays_up_to": paying}


def show(found: Sequence[Mapping[str, Any]], device: str) -> None:
    """Print the table."""
    table = Table(title=f"Seconds a trial, {device} (in brackets: times as fast as alone)")
    for heading in ("LoRA at", "alone", *(f"pack of {size}" for size in SIZES), "pays up to"):
        table.add_column(heading, justify="left" if heading == "LoRA at" else "right")
    for row in found:
        seconds, gain = row["seconds_a_trial"], row["gain"]
        packs = [f"{seconds[size]:.2f} ({gain[str(size)]:.2f}×)" for size in SIZES]
        table.add_row(row["place"], f"{seconds[1]:.2f}", *packs, str(row["pays_up_to"]))
    Console(width=150).print(table)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    task = DATASETS["questions"].task(train=arguments.steps * BATCH_SIZE, validation=200, test=100)
    backbone = Backbone.load(str(prepare("minilm")), task.head)
    training = Training(epochs=1, batch_size=BATCH_SIZE, device=arguments.device)
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    evaluator = Evaluator(backbone, task, training, objectives)
    evaluator.evaluate(configurations_at("query, value of the top third", backbone)[0])  # loads on first use
    found = [measure(evaluator, place, arguments.repeats) for place in (*PLACES, AT_RANDOM)]
    device = torch.cuda.get_device_name() if evaluator.device.type == "cuda" else "CPU, processor time"
    show(found, device)
    record = {
        "command": f"python -m benchmarks.packing --steps {arguments.steps} --repeats {arguments.repeats}",
        "machine": this_machine(f"{torch.get_num_threads()} threads"),
        "device": device,
        "places": found,
    }
    path = RESULTS.with_stem("packing_cuda") if evaluator.device.type == "cuda" else RESULTS
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
