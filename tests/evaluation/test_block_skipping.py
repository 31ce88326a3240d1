"""What lies below a cut: run in evaluation mode, left out, and put back as it was."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.evaluation.frozen_blocks.block_skipping import (
    Structure,
    UnservableError,
    evaluation_mode_below,
    states_at,
)
from autopeft.models.backbone import Backbone
from tests.loss_task import CROSS_ENTROPY
from tests.tiny_models import HEADS, fingerprint, tiny_backbone, tiny_batch

BLOCKS = 3
DEPTH = {"gpt2": "n_layer", "distilbert": "n_layers", "t5": "num_layers"}
SERVABLE = [name for name in HEADS if name != "t5"]
BATCH = tiny_batch()


def backbone_of(architecture: str, **options: Any) -> Backbone:
    options[DEPTH.get(architecture, "num_hidden_layers")] = BLOCKS
    return tiny_backbone(architecture, **options)


def hidden_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_dropout_is_off_below_the_cut_and_on_above(cut: int) -> None:
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "classifier_dropout": 0.5}
    backbone = backbone_of("bert", **dropout)
    model, blocks = backbone.model, backbone.blocks
    seen: list[torch.Tensor] = []
    (blocks[cut - 1] if cut else blocks[0]).register_forward_hook(
        lambda _block, inputs, output: seen.append(hidden_of(output) if cut else inputs[0])
    )
    with evaluation_mode_below(cut, backbone), torch.no_grad():
        model(**BATCH)  # in evaluation mode
        model.train()
        model(**BATCH)
        assert torch.equal(*seen)
        first, second = model(**BATCH).logits, model(**BATCH).logits
        assert not torch.equal(first, second)
        assert all(module.training for module in model.modules())
        model.eval()
        assert torch.equal(model(**BATCH).logits, model(**BATCH).logits)
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("architecture", SERVABLE)
@pytest.mark.parametrize("cut", range(1, BLOCKS + 1))
def test_serving_gives_the_same_logits_and_runs_nothing_below(architecture: str, cut: int) -> None:
    backbone = backbone_of(architecture)
    model, blocks = backbone.model, backbone.blocks
    before = fingerprint(model)
    ran: list[int] = []
    with evaluation_mode_below(cut, backbone), torch.no_grad():
        structure = Structure(backbone, CROSS_ENTROPY, BATCH)
        assert structure.obstacle(cut) is None
        states, expected = states_at([cut], backbone, CROSS_ENTROPY, BATCH)[cut], model(**BATCH).logits
        handles = [
            norm.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
            for index, block in enumerate(blocks)
            for norm in list(block.modules())[-1:]
        ]
        with structure.serving(cut, states):
            served = model(**BATCH).logits
        for handle in handles:
            handle.remove()
        assert torch.equal(served, expected)
        assert min(ran, default=BLOCKS) >= cut
        assert torch.equal(model(**BATCH).logits, expected)
        states[0] = torch.randn(states.shape[1:])
        with structure.serving(cut, states):  # the states are what is taken, not the tokens
            assert not torch.allclose(model(**BATCH).logits[0], expected[0])
    assert fingerprint(model) == before


def test_a_block_that_returns_more_cannot_be_left_out() -> None:
    backbone = backbone_of("t5")
    with torch.no_grad():
        structure = Structure(backbone, CROSS_ENTROPY, BATCH)
    assert structure.obstacle(0) is None
    assert "block 0 returns more than hidden states" in str(structure.obstacle(1))
    with (
        pytest.raises(UnservableError, match="block 0"),
        structure.serving(1, torch.zeros(3, 9, 32)),
    ):
        raise AssertionError("served nevertheless")


def test_a_block_that_is_run_twice_cannot_be_left_out() -> None:
    shared = nn.Linear(4, 4)

    class Twice(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return shared(shared(hidden))  # type: ignore[no-any-return]

    backbone: Any = SimpleNamespace(model=Twice(), blocks=(shared,), stacks={"": (("", 0),)})
    with torch.no_grad():
        structure = Structure(backbone, CROSS_ENTROPY, {"hidden": torch.zeros(1, 2, 4)})
    assert structure.obstacle(0) is None
    assert "not run once" in str(structure.obstacle(1))


def test_a_broken_pass_leaves_modes_and_blocks_as_they_were() -> None:
    backbone = backbone_of("bert")
    model, blocks = backbone.model, backbone.blocks
    model.train()
    before = fingerprint(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("the wire came loose")

    with evaluation_mode_below(2, backbone):
        structure = Structure(backbone, CROSS_ENTROPY, BATCH)
        states = states_at([2], backbone, CROSS_ENTROPY, BATCH)[2]
        for index in (0, 2):
            handle = blocks[index].register_forward_hook(fail)
            for serving in (contextlib.nullcontext(), structure.serving(2, states)):
                with pytest.raises(RuntimeError, match="wire"), serving:
                    model(**BATCH)
                assert all(module.training for module in model.modules())
            handle.remove()
    assert fingerprint(model) == before


def test_states_of_another_shape_are_refused() -> None:
    backbone = backbone_of("bert")
    with torch.no_grad():
        structure = Structure(backbone, CROSS_ENTROPY, BATCH)
        states = states_at([2], backbone, CROSS_ENTROPY, BATCH)[2][:, :-1]
        with structure.serving(2, states), pytest.raises(RuntimeError, match="do not fit"):
            backbone.model(**BATCH)
