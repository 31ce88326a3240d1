"""What scoring the sites costs, beside an epoch of LoRA training on the same batches.

    python -m benchmarks.scoring [--batches 64]

MiniLM on question classification, batch size 16: sets of scores, each in one pass, against one epoch of LoRA
of rank 8 on all linear modules, one thread; peak live bytes of all cheap scores and of the
training with one row more in its batch. Both are done in single precision, and in bfloat16, as a search does
both on processors that multiply it; and how far that moves the scores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from assets.prepare import prepare
from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.core.precision import Precision
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import ScoreGuided
from autopeft.search_spaces.score_allocation import Allocation
from autopeft.sensitivity import CHEAP_SCORES, SiteScores, compute_scores
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.memory import measure_live_storage

RESULTS = Path(__file__).parent / "results" / "scoring.json"
BATCH_SIZE = 16
PRECISIONS: tuple[Precision, ...] = ("32-true", "bf16-mixed")
_SETS = {
    f"all {len(CHEAP_SCORES)} cheap scores": CHEAP_SCORES,
    "what ScoreGuided asks for": ScoreGuided().scores,
    "the four of single batches' gradients": ("gradient_norm", "fisher", "snip", "taylor2"),
    "gradient norm": ("gradient_norm",),
    "explained variance": ("explained_variance",),
}
_EPOCH = "an epoch of LoRA 8 (peak: with one row more)"
WIDTH = 32


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    """Return a batch of a fixed width."""
    tokens = torch.randint(1000, 20000, (rows, WIDTH))
    labels = torch.arange(rows) % 6
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def uniform(backbone: Backbone) -> Configuration:
    """Return LoRA of rank 8 on all linear modules."""
    sites = Allocation(budget=1).candidates(backbone)
    return Configuration.from_dict({"sites": {str(site): {"method": "lora", "size": 8} for site in sites}})


def peak_of_scoring(task: TextClassification, precision: Precision) -> int:
    """Return the peak live bytes of scoring one batch, on a model that has not been used yet."""
    backbone = Backbone.load(str(prepare("minilm")), task.head)
    batch = batch_of(BATCH_SIZE)
    counter = StorageCounter()
    base = counter.exclude((*batch.values(), *backbone.model.parameters(), *backbone.model.buffers()))
    with counter:
        compute_scores(backbone, [batch], task, precision=precision)
    return base + counter.peak_bytes


def peak_of_training(backbone: Backbone, task: TextClassification, precision: Precision) -> int:
    """Return the peak live bytes of LoRA training steps with one row more."""
    with attach(backbone, uniform(backbone)):
        backbone.model.train()
        try:
            batch = batch_of(BATCH_SIZE + 1)
            return measure_live_storage(backbone.model, batch, task, precision=precision)
        finally:
            backbone.model.eval()


def agreement(first: Mapping[str, SiteScores], second: Mapping[str, SiteScores]) -> dict[str, float]:
    """Return Spearman's correlation of the sites between two computations, by score; not of constant ones."""
    return {
        name: float(
            stats.spearmanr(list(scores.values.values()), list(second[name].values.values())).statistic
        )
        for name, scores in first.items()
        if len(set(scores.values.values())) > 1
    }


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print a table."""
    table = Table(title=title)
    for heading in ("", "precision", "seconds", "of its epoch", "of single precision's", "peak live MiB"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        shares = (f"{row[name]:.2f}" for name in ("share", "share_of_single_precision"))
        table.add_row(row["what"], row["precision"], f"{row['seconds']:.1f}", *shares, peak)
    Console(width=130).print(table)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=64)
    batches = parser.parse_args().batches
    torch.set_num_threads(1)
    task = DATASETS["questions"].task(train=batches * BATCH_SIZE, validation=100, test=100)
    backbone = Backbone.load(str(prepare("minilm")), task.head)
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    training = Training(epochs=1, batch_size=BATCH_SIZE, device="cpu")
    evaluators = {
        precision: Evaluator(backbone, task, replace(training, precision=precision), objectives)
        for precision in PRECISIONS
    }
    given = list(islice(evaluators["32-true"].data.train_dataloader(), batches))
    seconds: dict[tuple[str, Precision], float] = {}
    found: dict[tuple[str, Precision], Mapping[str, SiteScores]] = {}
    for precision, evaluator in evaluators.items():
        compute_scores(backbone, given[:1], task, precision=precision)  # what is loaded on first use
        for title, scores in _SETS.items():
            started = time.perf_counter()
            found[title, precision] = compute_scores(backbone, given, task, scores, precision=precision)
            seconds[title, precision] = time.perf_counter() - started
        seconds[_EPOCH, precision] = evaluator.evaluate(uniform(backbone)).values["training_seconds"]
    every = next(iter(_SETS))
    peaks: dict[tuple[str, Precision], int] = {}
    for precision in PRECISIONS:
        peaks[every, precision] = peak_of_scoring(task, precision)
        peaks[_EPOCH, precision] = peak_of_training(backbone, task, precision)
    correlations = agreement(*(found[every, precision] for precision in PRECISIONS))
    rows = [
        {
            "what": title,
            "precision": precision,
            "seconds": taken,
            "share": taken / seconds[_EPOCH, precision],
            "share_of_single_precision": taken / seconds[_EPOCH, "32-true"],
            "peak_bytes": peaks.get((title, precision)),
        }
        for (title, precision), taken in seconds.items()
    ]
    show(rows, f"{batches} batches of {BATCH_SIZE}")
    lowest = min(correlations, key=lambda name: correlations[name])
    print(f"Lowest rank correlation of sites between precisions: {correlations[lowest]:.4f} ({lowest})")
    record = {
        "command": f"python -m benchmarks.scoring --batches {batches}",
        "machine": this_machine(),
        "rows": rows,
        "rank_correlation_of_precisions": correlations,
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
