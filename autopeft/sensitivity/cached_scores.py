"""Score the sites of a backbone on a task, once: what was computed is kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from autopeft.core.durable_files import load_json, save_json
from autopeft.core.errors import check_whole
from autopeft.core.precision import Precision
from autopeft.core.profiling import section
from autopeft.models.backbone import Backbone
from autopeft.sensitivity.computation import ScoreOptions, compute_scores
from autopeft.sensitivity.control_scores import TrainOne
from autopeft.sensitivity.registry import SCORES
from autopeft.sensitivity.site_scores import SiteScores
from autopeft.tasks import Task
from autopeft.tasks.base import TaskData

SCORE_BATCHES = 4
"""Unless told otherwise: more move the ranking of the sites little (`benchmarks/score_batches.py`)."""


@section("score")
def cached_scores(
    backbone: Backbone,
    task: Task,
    data: TaskData,
    names: Sequence[str],
    *,
    seed: int,
    precision: Precision,
    batch_size: int,
    batches: int = SCORE_BATCHES,
    train_one: TrainOne | None = None,
    folder: Path | None = None,
) -> dict[str, SiteScores]:
    """Return scores of every site by name, from the first batches of the training split.

    A new head is random, by the seed; validation and test split are not read, but for `leave_one_out`, which
    trains a configuration a site and scores it on the validation split.

    Args:
        backbone: The backbone, with nothing attached.
        task: Gives the loss.
        data: Its data for this backbone, in batches of `batch_size`.
        names: Scores of `autopeft.sensitivity.SCORES`.
        seed: Seed of everything that a score draws.
        precision: See `ScoreOptions`.
        batch_size: Rows of a training batch.
        batches: Training batches to use; fewer where the training split has fewer.
        train_one: Trains a configuration and returns its validation score; for `leave_one_out`.
        folder: Where scores of all these settings are kept; None to keep none.

    Raises:
        ValueError: A score is unknown, or batches is below 1.
    """
    check_whole("batches", batches, what="a number of training batches", least=1)
    identity = {
        "backbone": backbone.identity(),
        "task": dict(task.identity()),
        "seed": seed,
        "batch_size": batch_size,
        "batches": batches,
        "precision": precision,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = None if folder is None else folder / f"{digest}.json"
    kept = () if path is None else load_json(path) or ()
    known = {each["name"]: SiteScores.from_dict(each) for each in kept if each["name"] in SCORES}
    missing = [name for name in names if name not in known]
    if missing:
        with torch.random.fork_rng(devices=[]):
            first = list(islice(data.train_dataloader(), batches))
        options = ScoreOptions(precision=precision)
        known |= compute_scores(
            backbone, first, task.loss, missing, seed=seed, train_one=train_one, options=options
        )
        if path is not None:
            save_json(path, [scores.to_dict() for scores in known.values()])
    return {name: known[name] for name in names}
