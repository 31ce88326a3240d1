"""What a search scores its sites in: on which batches, and in what precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from autopeft.evaluation.site_scoring import score_sites
from autopeft.sensitivity import compute_scores
from autopeft.training.settings import TrainingPrecision
from tests.learnable import TRAINING, tiny_evaluator

NAMES = ("gradient_norm", "explained_variance")


def flipped(content: bytes) -> bytes:
    """Change one digit of a score."""
    place = max(place for place, byte in enumerate(content) if chr(byte).isdigit())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


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
    found = score_sites(evaluator, NAMES, batches=2)
    batches = list(islice(evaluator.data.train_dataloader(), 2))
    assert found == compute_scores(
        evaluator.backbone,
        batches,
        evaluator.task,
        NAMES,
        precision=expected,  # type: ignore[arg-type]
    )


def test_scores_of_another_precision_are_not_taken_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for quick in (True, False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda quick=quick: {"avx512_bf16": quick})
        evaluator = tiny_evaluator(training=replace(TRAINING, precision="auto"))
        found.append(score_sites(evaluator, NAMES, batches=2, folder=tmp_path))
    assert found[0] != found[1]
    assert found[0] == found[2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:100], flipped])
def test_damaged_scores_are_computed_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluator = tiny_evaluator()
    whole = score_sites(evaluator, NAMES, batches=2, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert score_sites(evaluator, NAMES, batches=2, folder=tmp_path) == whole
    (warning,) = caplog.messages
    assert str(path) in warning
    assert score_sites(evaluator, NAMES, batches=2, folder=tmp_path) == whole
    assert len(caplog.messages) == 1
