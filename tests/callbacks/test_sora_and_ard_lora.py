"""Gates that are learned: SoRA and ARDLoRA."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.callbacks import (
    ARDLoRA,
    SoRA,
    find_lora_modules,
)
from autopeft.callbacks.ard_lora import neighbours
from tests.callbacks.lora_fits import (
    RANK,
    ROWS,
    Classifier,
    Probe,
    batch_of,
    examples,
    fit,
    gated_loss,
    logits_of,
    lora,
)
from tests.conftest import ModelFactory


def ones(classifier: Classifier) -> dict[str, Tensor]:
    return {name: torch.ones(module.rank) for name, module in find_lora_modules(classifier).items()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sparse_gates_take_the_proximal_step(tiny_gpt2: ModelFactory, accumulate: int) -> None:
    classifier = lora(tiny_gpt2(), RANK)
    reference = copy.deepcopy(classifier)
    callback = SoRA(0.01, learning_rate=2.0)
    probe = Probe(lambda: callback.state_dict()["gates"])
    fit(classifier, callback, probe, steps=1, accumulate_grad_batches=accumulate)
    gates = {name: gate.requires_grad_() for name, gate in ones(reference).items()}
    loss = gated_loss(reference, gates, examples()[: accumulate * ROWS])
    slopes = torch.autograd.grad(loss, list(gates.values()))
    for (name, gate), slope in zip(gates.items(), slopes, strict=True):
        descended = gate.detach() - 2.0 * slope
        expected = descended.sign() * torch.clamp(descended.abs() - 0.02, min=0)
        torch.testing.assert_close(probe.notes[-1][name], expected)
        assert slope.abs().max() > 0


def test_gates_fall_to_exactly_zero_and_leave_the_backbone(tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK)
    callback = SoRA(5.0, learning_rate=0.1)
    fit(classifier, callback, steps=4)
    assert set(callback.ranks().values()) == {0}
    assert torch.equal(logits_of(classifier), logits_of(Classifier(tiny_llama())))


def test_gates_learn_what_helps(tiny_llama: ModelFactory) -> None:
    """Without a penalty the gates descend the loss, whatever the module's optimizer does."""
    classifier = lora(tiny_llama(), RANK)
    classifier.rate = 0.0
    batch = batch_of(examples())
    before = float(classifier.loss(batch).detach())
    callback = SoRA(0.0, learning_rate=5.0)
    fit(classifier, callback, steps=40)
    assert float(classifier.loss(batch).detach()) < before - 1e-3


def total_variation(gates: dict[str, Tensor]) -> Tensor:
    total = torch.zeros(())
    for name, gate in gates.items():
        following = name.replace("layers.0", "layers.1")
        if following != name:
            total = total + (gate - gates[following]).abs().sum()
    return total


@pytest.mark.parametrize("granularity", ["rank", "module"])
def test_scales_descend_the_loss_and_the_total_variation(tiny_llama: ModelFactory, granularity: Any) -> None:
    classifier = lora(tiny_llama(), RANK)
    reference = copy.deepcopy(classifier)
    length = RANK if granularity == "rank" else 1
    start = {name: 1 + 0.1 * torch.randn(length) for name in find_lora_modules(classifier)}
    callback = ARDLoRA(0.01, total_variation=0.05, granularity=granularity, learning_rate=0.5)
    callback.load_state_dict({"gates": start})
    probe = Probe(callback.scales)
    fit(classifier, callback, probe, steps=1)
    scales = {name: scale.clone().requires_grad_() for name, scale in start.items()}
    objective = gated_loss(reference, scales) + 0.05 * total_variation(scales)
    slopes = torch.autograd.grad(objective, list(scales.values()))
    for (name, scale), slope in zip(scales.items(), slopes, strict=True):
        descended = scale.detach() - 0.5 * slope
        expected = descended.sign() * (descended.abs() - 0.005).clamp(min=0)
        torch.testing.assert_close(probe.notes[0][name], expected)


def test_total_variation_draws_blocks_together(tiny_llama: ModelFactory) -> None:
    names = list(find_lora_modules(lora(tiny_llama(), RANK)))

    def spread(strength: float) -> float:
        callback = ARDLoRA(0.0, total_variation=strength, learning_rate=0.05)
        gates = {name: torch.full((RANK,), 0.5 if "layers.0" in name else 1.5) for name in names}
        callback.load_state_dict({"gates": gates})
        fit(lora(tiny_llama(), RANK), callback, probe := Probe(callback.scales), steps=8)
        return float(total_variation(probe.notes[-1]))

    assert spread(1.0) < 0.4 * spread(0.0)


def test_neighbours_are_the_same_module_of_consecutive_blocks() -> None:
    names = ["h.0.query", "h.0.value", "h.1.query", "h.10.query", "h.10.value", "head"]
    assert neighbours(names) == [
        ("h.0.query", "h.1.query"),
        ("h.1.query", "h.10.query"),
        ("h.0.value", "h.10.value"),
    ]


@pytest.mark.parametrize("kind", [SoRA, ARDLoRA])
def test_gate_arguments_out_of_range_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="penalty must be a finite number of at least 0, got -1"):
        kind(-1)
    with pytest.raises(ValueError, match="penalty must be a finite number of at least 0, got nan"):
        kind(math.nan)
    with pytest.raises(ValueError, match="learning_rate must be a finite number above 0"):
        kind(1.0, learning_rate=0)


def test_scale_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="total_variation must be a finite number of at least 0"):
        ARDLoRA(1.0, total_variation=-0.1)
    with pytest.raises(ValueError, match="granularity is 'rank' or 'module', got 'head'"):
        ARDLoRA(1.0, granularity="head")  # type: ignore[arg-type]
