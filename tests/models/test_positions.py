"""How many positions a model has learnt: rows of that length run, longer ones do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autopeft.models.positions import check_positions, learnt_positions
from tests.tiny_models import tiny_language_model, tiny_model

LEARNT = ("albert", "bart", "bert", "distilbert", "electra", "gpt2", "mpnet", "opt", "roberta")
COMPUTED = ("bloom", "gpt_neox", "llama", "mamba", "modernbert", "mpt", "t5")


@pytest.mark.parametrize("architecture", LEARNT)
@torch.no_grad()
def test_rows_may_be_as_long_as_the_positions_that_are_learnt(architecture: str) -> None:
    model = tiny_model(architecture)
    most = learnt_positions(model)
    assert most is not None
    assert 60 < most <= 64
    call: Any = model
    check_positions(model, most)
    call(input_ids=torch.full((1, most), 5))
    with pytest.raises(ValueError, match=rf"has learnt {most} positions, and rows have up to {most + 1}"):
        check_positions(model, most + 1)
    with pytest.raises((IndexError, RuntimeError)):
        call(input_ids=torch.full((1, most + 1), 5))


@pytest.mark.parametrize("architecture", COMPUTED)
def test_positions_that_are_computed_bound_no_row(architecture: str) -> None:
    assert learnt_positions(tiny_model(architecture)) is None


def test_other_tables_are_no_positions() -> None:
    assert learnt_positions(tiny_language_model("gpt2", vocab_size=64, n_positions=32)) == 32
    assert learnt_positions(tiny_language_model("llama", max_position_embeddings=128)) is None  # as words
