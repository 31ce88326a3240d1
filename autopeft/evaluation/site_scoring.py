"""Score the sites of an evaluator's backbone on its task, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.sensitivity import SiteScores
from autopeft.sensitivity.cached_scores import SCORE_BATCHES, cached_scores


def score_sites(
    evaluator: Evaluator,
    names: Sequence[str],
    *,
    batches: int = SCORE_BATCHES,
    folder: Path | None = None,
) -> dict[str, SiteScores]:
    """Return scores of every site by name; see `cached_scores`.

    Raises:
        ValueError: A score is unknown, batches is below 1, or a training for `leave_one_out` failed.
    """

    def train_one(configuration: Configuration) -> float:
        trained = evaluator.evaluate(configuration)
        if trained.status != "complete":
            raise ValueError(f"Training {configuration!r} alone failed: {trained.reason}")
        return trained.values[evaluator.monitor]

    return cached_scores(
        evaluator.backbone,
        evaluator.task,
        evaluator.data,
        names,
        seed=evaluator.seed,
        precision=evaluator.training.resolved_precision(),
        batch_size=evaluator.training.batch_size,
        batches=batches,
        train_one=train_one,
        folder=folder,
    )
