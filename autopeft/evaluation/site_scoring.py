"""Score the sites of an evaluator's backbone on its task, once: what was computed is kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from autopeft.core.configuration import Configuration
from autopeft.core.durable_files import load_json, save_json
from autopeft.core.errors import check_whole
from autopeft.core.profiling import section
from autopeft.evaluation.evaluator import Evaluator
from autopeft.sensitivity import SCORES, SiteScores, compute_scores
from autopeft.training.free_memory import return_free_memory

SCORE_BATCHES = 4
"""Unless told otherwise: more move the ranking of the sites little (`benchmarks/score_batches.py`)."""


@section("score")
def score_sites(
    evaluator: Evaluator, names: Sequence[str], *, batches: int = SCORE_BATCHES, folder: Path | None = None
) -> dict[str, SiteScores]:
    """Return scores of every site by name, from the first batches of the training split.

    A new head is random, by the evaluator's seed. Only `leave_one_out` reads the validation split: it trains
    a configuration a site.

    Args:
        evaluator: Has the backbone, with nothing attached, the task and its data.
        names: Scores of `autopeft.sensitivity.SCORES`.
        batches: Training batches to use; fewer where the training split has fewer.
        folder: Where scores of all these settings are kept; None to keep none.
    """

    def train_one(configuration: Configuration) -> float:
        trained = evaluator.evaluate(configuration)
        if trained.status != "complete":
            raise ValueError(f"Training {configuration!r} alone failed: {trained.reason}")
        return evaluator.monitor.sign * trained.values[evaluator.monitor.name]

    check_whole("batches", batches, what="a number of training batches", least=1)
    precision = evaluator.training.resolved_precision()
    parts = batches * evaluator.training.accumulate
    identity = {
        "backbone": evaluator.backbone.identity(),
        "task": dict(evaluator.task.identity()),
        "seed": evaluator.seed,
        "batch_size": evaluator.training.part_size,
        "batches": parts,
        "precision": precision,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = None if folder is None else folder / f"{digest}.json"
    kept = () if path is None else load_json(path) or ()
    known = {each["name"]: SiteScores.from_dict(each) for each in kept if each["name"] in SCORES}
    missing = [name for name in names if name not in known]
    if missing:
        with torch.random.fork_rng(devices=[]):
            first = list(islice(evaluator.data.train_dataloader(), parts))
        known |= compute_scores(
            evaluator.backbone,
            first,
            evaluator.task,
            missing,
            seed=evaluator.seed,
            train_one=train_one,
            precision=precision,
        )
        return_free_memory()
        if path is not None:
            save_json(path, [scores.to_dict() for scores in known.values()])
    return {name: known[name] for name in names}
