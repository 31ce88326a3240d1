"""What a candidate costs in a pack, against the same candidate trained alone, and where packing stops paying.

    python -m benchmarks.packing [--steps 16] [--repeats 2] [--trials 16]

LoRA of rank 8 on MiniLM and question classification, batch size 32, the first validation included: at all
linear modules, at those of the top half of the blocks, at query and value of the top third. Packs of 1, 2, 4
and 8 candidates with different learning rates (`PackedTrainer`) take turns with a candidate alone
(`Evaluator.train`) in one run. On the CPU, processor seconds of the process, which other work on the machine
does not count into; on CUDA, elapsed seconds. The least of the repeats counts.

Then whole searches (`Search(pack_size=...)`, per-layer LoRA drawn at random, hidden states below the lowest
adapter on disk before): what a trial takes by the number of candidates that are trained together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft import Search
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.forward import cut_of
from autopeft.evaluation.packing.trainer import PackedTrainer, packing_gain
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS

RESULTS = Path(__file__).parent / "results" / "packing.json"
BATCH_SIZE = 32
SIZES = (1, 2, 4, 8)
PAYING = 1.05  # a doubling of the pack pays where it takes this factor off a candidate's seconds
_LINEAR = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
PLACES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "all linear modules": ("0-5", _LINEAR),
    "linear modules of the top half": ("3-5", _LINEAR),
    "query, value of the top third": ("4-5", ("query", "value")),
}


def candidates(place: str, count: int) -> list[Configuration]:
    """Return LoRA at the same sites with different learning rates."""
    blocks, roles = PLACES[place]
    sites = {f"{blocks}.{role}": {"method": "lora", "size": 8} for role in roles}
    return [
        Configuration.from_dict({"learning_rate": 1e-3 * (1 + index / 4), "sites": sites})
        for index in range(count)
    ]


def seconds_of(evaluator: Evaluator, work: Callable[[], list[Evaluation]]) -> float:
    """Return what a piece of work takes."""
    on_cuda = evaluator.device.type == "cuda"
    clock = time.perf_counter if on_cuda else time.process_time
    started = clock()
    for evaluation in work():
        assert evaluation.status == "complete", evaluation.reason
    return clock() - started


def measure(evaluator: Evaluator, place: str, repeats: int) -> dict[str, Any]:
    """Measure all packs and a candidate alone, in turn."""
    trainer = PackedTrainer(evaluator)

    def train(pack: list[Configuration]) -> list[Evaluation]:
        return [one.evaluation for one in trainer.train(pack)]

    alone: list[float] = []
    together: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(repeats):
        alone.append(seconds_of(evaluator, lambda: [evaluator.evaluate(candidates(place, 1)[0])]))
        for size in SIZES:
            took = seconds_of(evaluator, partial(train, candidates(place, size)))
            together[size].append(took / size)
    blocks = len(evaluator.backbone.blocks)
    cut = cut_of(evaluator.backbone, candidates(place, 1)[0])
    rows = [
        {
            "candidates": size,
            "seconds_a_candidate": min(took),
            "gain": min(alone) / min(took),
            "gain_by_work": packing_gain([cut] * size, blocks),
        }
        for size, took in together.items()
    ]
    paying = SIZES[0]
    for smaller, larger in pairwise(rows):
        if smaller["seconds_a_candidate"] / larger["seconds_a_candidate"] < PAYING:
            break
        paying = int(larger["candidates"])
    return {"place": place, "seconds_alone": min(alone), "pays_up_to": paying, "packs": rows}


def search(
    backbone: Backbone, task: TextClassification, training: Training, trials: int, repeats: int
) -> list[dict[str, Any]]:
    """Run the same search with packs of several sizes, in turn; return what a trial takes."""
    took: dict[int, list[float]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(-1, repeats):  # the first of all computes the hidden states, and does not count
            for size in SIZES if repeat >= 0 else (1,):
                one = Search(
                    backbone,
                    task,
                    PerLayer(methods=("lora",), ranks=(1, 32)),
                    objectives=("accuracy", "trainable_parameters"),
                    training=training,
                    sampler="random",
                    halving=None,
                    seeds=1,
                    baselines=False,
                    pack_size=size,
                    name=f"packs of {size} {repeat + 1}",
                    folder=folder,
                    tracking=None,
                )
                seconds = seconds_of(one.evaluator, partial(_run, one, trials))
                if repeat >= 0:
                    took[size].append(seconds / trials)
    return [
        {"pack_size": size, "seconds_a_trial": min(times), "gain": min(took[1]) / min(times)}
        for size, times in took.items()
    ]


def _run(search: Search, trials: int) -> list[Evaluation]:
    return [one.evaluation for one in search.run(trials=trials, progress=False).records]


def show(found: list[dict[str, Any]], searches: list[dict[str, Any]], device: str) -> None:
    """Print the tables."""
    table = Table(title=f"Seconds a candidate, {device}")
    for heading in ("LoRA 8 at", "alone", *(f"pack of {size}" for size in SIZES), "pays up to"):
        table.add_column(heading, justify="left" if heading == "LoRA 8 at" else "right")
    for one in found:
        packs = [
            f"{row['seconds_a_candidate']:.2f} ({row['gain']:.2f}×; {row['gain_by_work']:.2f})"
            for row in one["packs"]
        ]
        table.add_row(one["place"], f"{one['seconds_alone']:.2f}", *packs, str(one["pays_up_to"]))
    Console(width=150).print(table)
    whole = Table(title=f"Seconds a trial of a search, {device}")
    for row in searches:
        whole.add_column(f"pack_size={row['pack_size']}", justify="right")
    whole.add_row(*(f"{row['seconds_a_trial']:.2f} ({row['gain']:.2f}×)" for row in searches))
    Console(width=150).print(whole)
    print("In brackets: the gain over a candidate alone; behind it what the work in block passes would give.")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    task = DATASETS["questions"].task(train=arguments.steps * BATCH_SIZE, validation=200, test=100)
    backbone = Backbone.load(str(prepare("minilm")), task.head)
    training = Training(epochs=1, batch_size=BATCH_SIZE, device=arguments.device)
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    evaluator = Evaluator(backbone, task, training, objectives)
    evaluator.evaluate(candidates("query, value of the top third", 1)[0])  # what is loaded on first use
    found = [measure(evaluator, place, arguments.repeats) for place in PLACES]
    searches = search(backbone, task, training, arguments.trials, arguments.repeats)
    device = torch.cuda.get_device_name() if evaluator.device.type == "cuda" else "CPU, processor time"
    show(found, searches, device)
    record = {
        "command": f"python -m benchmarks.packing --steps {arguments.steps} --repeats {arguments.repeats} "
        f"--trials {arguments.trials}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": device,
        "steps": arguments.steps,
        "places": found,
        "searches": searches,
    }
    path = RESULTS.with_stem("packing_cuda") if evaluator.device.type == "cuda" else RESULTS
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
