"""Score the sites of a search's backbone on its task, once: what was computed is kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_whole
from autopeft.core.profiling import section
from autopeft.evaluation.evaluator import Evaluator
from autopeft.reporting.sensitivity_report import SensitivityReport, dump_scores, read_scores
from autopeft.sensitivity import ScoreOptions, SiteScores, compute_scores

SCORE_BATCHES = 4
"""Unless told otherwise: more move the ranking of the sites little (`benchmarks/score_batches.py`)."""


@section("score")
def score_sites(
    evaluator: Evaluator,
    names: Sequence[str],
    *,
    batches: int = SCORE_BATCHES,
    folder: Path | None = None,
) -> SensitivityReport:
    """Return scores of every site, from the first batches of the training split.

    A new head is random, and its seed is the evaluator's; validation and test split are not read, but for
    `leave_one_out`, which trains a configuration a site and scores it on the validation split.

    Args:
        evaluator: Holds backbone, data and loss.
        names: Scores of `autopeft.sensitivity.SCORES`.
        batches: Training batches to use; fewer where the training split has fewer.
        folder: Where scores of (backbone, task, seed, batches) are kept; None to keep none.

    Raises:
        ValueError: A score is unknown, or batches is below 1.
    """
    check_whole("batches", batches, what="a number of training batches", least=1)
    path = None if folder is None else folder / f"{_digest(evaluator, batches)}.json"
    known = read_scores(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    missing = [name for name in names if name not in known]
    started = time.perf_counter()
    if missing:
        known |= _compute(evaluator, missing, batches)
        if path is not None:
            _write(path, dump_scores(known))
    return SensitivityReport(
        scores={name: known[name] for name in names},
        batches=batches,
        seconds=time.perf_counter() - started if missing else 0.0,
    )


def _compute(evaluator: Evaluator, names: Sequence[str], batches: int) -> dict[str, SiteScores]:
    def train_one(configuration: Configuration) -> float:
        trained = evaluator.evaluate(configuration)
        if trained.status != "complete":
            raise ValueError(f"Training {configuration!r} alone failed: {trained.reason}")
        return trained.values[evaluator.monitor]

    with torch.random.fork_rng(devices=[]):
        first = list(islice(evaluator.data.train_dataloader(), batches))
    return compute_scores(
        evaluator.backbone,
        first,
        evaluator.task.loss,
        names,
        seed=evaluator.seed,
        train_one=train_one,
        options=ScoreOptions(precision=evaluator.training.resolved_precision()),
    )


def _digest(evaluator: Evaluator, batches: int) -> str:
    identity = {
        "backbone": evaluator.backbone.identity(),
        "task": dict(evaluator.task.identity()),
        "seed": evaluator.seed,
        "batch_size": evaluator.training.batch_size,
        "batches": batches,
        "precision": evaluator.training.resolved_precision(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
