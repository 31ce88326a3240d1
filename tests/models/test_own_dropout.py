from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from autopeft.models.own_dropout import own_dropout
from tests.tiny_models import tiny_batch, tiny_language_model

RATES: dict[str, dict[str, Any]] = {
    "gpt2": {"embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
    "opt": {"attention_dropout": 0.3, "dropout": 0.3},
    "falcon": {"attention_dropout": 0.3, "hidden_dropout": 0.3, "parallel_attn": False},
    "bloom": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
    "phi3": {"attention_dropout": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3},
    "gpt_neox": {"attention_dropout": 0.3, "hidden_dropout": 0.3},
}


@pytest.mark.parametrize("architecture", RATES)
def test_dropout_is_left_out_of_trainings_and_put_back(architecture: str) -> None:
    model = tiny_language_model(architecture, **RATES[architecture])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        torch.manual_seed(0)
        found: torch.Tensor = model(**tiny_batch()).logits
        return found

    expected, config = logits(), model.config.to_dict()
    model.train()
    dropped = logits()
    assert not torch.allclose(dropped, expected, atol=1e-4)
    with suppress(KeyboardInterrupt), own_dropout(model, is_on=False):  # however the block ends
        assert all(module.training for module in model.modules())
        torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-6)
        raise KeyboardInterrupt
    assert model.config.to_dict() == config
    assert torch.equal(logits(), dropped)
    with own_dropout(model, is_on=True):
        assert torch.equal(logits(), dropped)
