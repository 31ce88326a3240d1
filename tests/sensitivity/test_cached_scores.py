"""What a search scores its sites in: on which batches, and in what precision."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from autopeft.sensitivity import ScoreOptions, compute_scores
from autopeft.sensitivity.cached_scores import score_sites
from autopeft.training.settings import TrainingPrecision
from tests.learnable import TRAINING, tiny_evaluator

NAMES = ("gradient_norm", "explained_variance")


@pytest.mark.parametrize(
    ("capabilities", "precision", "expected"),
    [
        ({"avx512_bf16": True}, "auto", "bf16-mixed"),
        ({"avx512_bf16": True}, "32-true", "32-true"),
        ({"avx512_bf16": False, "avx2": True}, "auto", "32-true"),
        ({}, "bf16-mixed", "bf16-mixed"),
    ],
)
def test_scores_are_in_bfloat16_where_the_processor_is_made_for_it(
    capabilities: dict[str, bool],
    precision: TrainingPrecision,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    evaluator = tiny_evaluator(training=replace(TRAINING, precision=precision))
    report = score_sites(evaluator, NAMES, batches=2)
    batches = list(islice(evaluator.data.train_dataloader(), 2))
    options = ScoreOptions(precision=expected)  # type: ignore[arg-type]
    assert report.scores == compute_scores(
        evaluator.backbone, batches, evaluator.task.loss, NAMES, options=options
    )


def test_scores_of_another_precision_are_not_taken_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for quick in (True, False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda quick=quick: {"avx512_bf16": quick})
        evaluator = tiny_evaluator(training=replace(TRAINING, precision="auto"))
        reports.append(score_sites(evaluator, NAMES, batches=2, folder=tmp_path))
    assert reports[0].scores != reports[1].scores
    assert reports[0].scores == reports[2].scores
    assert [one.seconds > 0 for one in reports] == [True, True, False]
