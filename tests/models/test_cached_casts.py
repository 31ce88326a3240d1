"""Weights that are cast once: the same numbers as autocast's, and a backbone that is left as it was."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.precision import autocast
from autopeft.methods import attach
from autopeft.models import cached_casts
from autopeft.models.backbone import Backbone
from autopeft.models.cached_casts import CachedCasts
from autopeft.sensitivity import compute_scores
from tests.learnable import TRAINING, tiny_evaluator
from tests.loss_task import CROSS_ENTROPY
from tests.sensitivity.references import labelled_batches
from tests.tiny_models import everywhere, fingerprint, places, tiny_backbone, tiny_batch

CASES = [
    *((architecture, "lora") for architecture in ("bert", "deberta-v2", "gpt2", "llama", "t5")),
    *(("bert", method) for method in ("ia3", "bitfit", "series", "parallel", "prefix", "layernorm")),
    ("llama", "ia3"),
]


def step(backbone: Backbone, method: str, *, lowered: bool) -> dict[str, Tensor]:
    """Return logits and all gradients of one pass forwards and backwards in mixed precision."""
    configuration = everywhere(backbone, method)
    with attach(backbone, configuration, seed=0) as attachment:
        in_place = backbone.cached_casts.in_place("bf16-mixed") if lowered else nullcontext()
        with in_place, autocast("bf16-mixed", "cpu"):
            logits = backbone.model(**tiny_batch()).logits
            logits.float().square().sum().backward()
        gradients = {
            name: parameter.grad
            for name, parameter in attachment.parameters.items()
            if parameter.grad is not None
        }
        assert gradients
        return {"logits": logits.detach(), **{name: gradient.clone() for name, gradient in gradients.items()}}


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_a_pass_gives_what_autocast_gives_bit_for_bit(architecture: str, method: str) -> None:
    backbone = tiny_backbone(architecture)
    plain, lowered = step(backbone, method, lowered=False), step(backbone, method, lowered=True)
    assert plain.keys() == lowered.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(lowered[name], expected, rtol=0, atol=0, msg=name)


def test_a_training_gives_what_autocast_gives_bit_for_bit() -> None:
    evaluator = tiny_evaluator(training=replace(TRAINING, precision="bf16-mixed"))
    configuration = everywhere(evaluator.backbone, "lora")
    with patch.object(cached_casts, "_cast", side_effect=cached_casts._cast) as cast:
        lowered = evaluator.train(configuration)
    assert cast.call_count, "copies were in place"
    with patch.object(cached_casts, "_is_castable", return_value=False):
        plain = evaluator.train(configuration)
    assert lowered.state is not None
    assert plain.state is not None
    assert all(torch.equal(tensor, plain.state[name]) for name, tensor in lowered.state.items())
    assert lowered.evaluation.values["accuracy"] == plain.evaluation.values["accuracy"]


def test_the_backbone_is_left_as_it_was_also_by_an_error() -> None:
    backbone = tiny_backbone("bert")
    before = fingerprint(backbone.model)
    weight = backbone.model.get_submodule(backbone.sites[places(backbone, "lora")[0]].module)
    with backbone.cached_casts.in_place("bf16-mixed"):
        assert weight.weight.dtype == torch.bfloat16
    with pytest.raises(KeyError), backbone.cached_casts.in_place("bf16-mixed"):
        raise KeyError
    assert weight.weight.dtype == torch.float32
    assert fingerprint(backbone.model) == before
    step(backbone, "lora", lowered=True)
    compute_scores(
        backbone,
        labelled_batches(1),
        CROSS_ENTROPY,
        ["gradient_norm"],
        precision="bf16-mixed",
    )
    assert weight.weight.dtype == torch.float32


def test_copies_follow_a_weight_that_has_changed_and_stay_inside_another_block() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    lowered = CachedCasts([layer])
    with lowered.in_place("bf16-mixed"):
        first = layer.weight
        with lowered.in_place("bf16-mixed"):
            assert layer.weight is first
        assert layer.weight is first
    layer.weight.data.fill_(0.5)
    with lowered.in_place("bf16-mixed"):
        assert layer.weight.unique().tolist() == [0.5]


def test_what_is_trained_or_is_not_asked_for_stays() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.requires_grad_(False)  # as in BitFit, the bias is trained
    lowered = CachedCasts([layer])
    with lowered.in_place("32-true"):
        assert layer.weight.dtype == torch.float32
    with lowered.in_place("bf16-mixed"):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.bias.dtype == torch.float32
        assert layer.bias.requires_grad
