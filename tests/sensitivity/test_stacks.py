"""Scores of encoder and decoder apart: each by the positions that count in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopeft.core.adapter import Site
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import compute_scores
from autopeft.tasks import Seq2Seq
from autopeft.tasks.batch import IGNORED, LABELS
from tests.tiny_models import tiny_chat_tokenizer, tiny_headed

TASK = Seq2Seq("unused")
NAMES = ("gradient_norm", "explained_variance")


@pytest.fixture(scope="module")
def bart() -> Backbone:
    model = tiny_headed(TASK.head, "bart")
    return Backbone(model, tiny_chat_tokenizer(), name="tiny-bart", head=(), new_head=False)


def padded(inputs: int, labels: int) -> dict[str, Tensor]:
    """Return two rows with so many tokens of padding: sources and targets are equally long without it."""
    generator = torch.Generator().manual_seed(0)
    ids, written = (torch.randint(5, 99, (2, 7), generator=generator) for _ in range(2))
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, inputs)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, inputs)),
        LABELS: torch.nn.functional.pad(written, (0, labels), value=IGNORED),
    }


@pytest.mark.parametrize(("inputs", "labels"), [(3, 0), (0, 3), (3, 3), (1, 4)])
def test_padding_of_sources_and_targets_changes_no_score(inputs: int, labels: int, bart: Backbone) -> None:
    expected = compute_scores(bart, [padded(0, 0)], TASK, NAMES)
    found = compute_scores(bart, [padded(inputs, labels)], TASK, NAMES)
    for name in NAMES:
        assert {site.stack for site in found[name].values} == {"encoder", "decoder"}
        for site, value in expected[name].values.items():
            assert found[name].values[site] == pytest.approx(value, rel=1e-3, abs=1e-6), (name, site)


def test_cross_attention_is_scored_by_the_encoders_tokens(bart: Backbone) -> None:
    """Its keys are given what the encoder returns, whichever decoder block they are in."""
    values = compute_scores(bart, [padded(2, 1)], TASK, ("explained_variance",))["explained_variance"].values
    keys = {values[Site(block, role, "decoder")] for block in (0, 1) for role in ("cross_key", "cross_value")}
    assert len(keys) == 1
    assert values[Site(0, "query", "decoder")] not in keys
