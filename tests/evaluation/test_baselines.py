"""Baselines: full fine-tuning in a copy, the head alone, the best learning rate of each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autopeft.core.configuration import Configuration
from autopeft.methods import FullFineTuning
from autopeft.models.backbone import Backbone
from examples.demo import full_fine_tuning, head_alone, uniform_lora
from tests.learnable import learner, tiny_evaluator
from tests.tiny_models import everywhere, fingerprint, logits_of, tiny_language_model, tiny_tokenizer


def test_full_fine_tuning_leaves_the_backbone_bit_identical() -> None:
    evaluator = tiny_evaluator()
    backbone = evaluator.backbone
    before, logits = fingerprint(backbone.model), logits_of(backbone)
    baseline = full_fine_tuning(evaluator, (1e-3, 1e-2))
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone), logits)
    assert backbone.attached is None
    assert (baseline.name, baseline.tried) == ("full fine-tuning", 2)
    assert baseline.evaluation.status == "complete"
    assert baseline.evaluation.values["trainable_parameters"] == backbone.parameters
    assert baseline.evaluation.configuration.learning_rate in (1e-3, 1e-2)


def test_every_weight_is_trained_in_a_copy() -> None:
    evaluator = tiny_evaluator()
    backbone = evaluator.backbone
    original = {name: parameter.detach().clone() for name, parameter in backbone.model.named_parameters()}
    trained = evaluator.train(Configuration(learning_rate=1e-2), attachment=FullFineTuning)
    assert trained.state is not None
    assert len(trained.state) == len(original)
    still = {
        name
        for name, tensor in original.items()
        if any(
            key.endswith(f".{name}") and torch.equal(weight, tensor) for key, weight in trained.state.items()
        )
    }
    assert still == set()


def test_the_best_learning_rate_is_taken() -> None:
    evaluator = tiny_evaluator()
    rates = (1e-6, 1e-2)
    scores = {
        rate: evaluator.evaluate(Configuration(learning_rate=rate)).values["accuracy"] for rate in rates
    }
    baseline = head_alone(evaluator, rates)
    assert baseline.name == "head alone"
    assert baseline.evaluation.values["accuracy"] == max(scores.values())
    assert baseline.evaluation.values["trainable_parameters"] == evaluator.backbone.head_parameters


def test_uniform_lora_is_on_every_query_and_value() -> None:
    evaluator = tiny_evaluator()
    baseline = uniform_lora(evaluator, (1e-2,))
    configuration = baseline.evaluation.configuration
    assert {(site.role, str(adapter)) for site, adapter in configuration} == {
        ("query", "lora(8)"),
        ("value", "lora(8)"),
    }
    assert len(configuration) == 2 * len(evaluator.backbone.blocks)


def test_full_fine_tuning_costs_more_memory_than_the_head() -> None:
    evaluator = tiny_evaluator()
    full, head = (baseline(evaluator, (1e-3,)).evaluation for baseline in (full_fine_tuning, head_alone))
    assert full.values["peak_memory"] > head.values["peak_memory"]


def test_tied_weights_stay_tied() -> None:
    backbone = learner()
    layers = backbone.model.bert.encoder.layer  # type: ignore[union-attr]
    first, second = (layers[index].attention.self for index in (0, 1))  # type: ignore[index,union-attr]
    second.query.weight = first.query.weight
    shared = first.query.weight
    backbone = Backbone(backbone.model, tiny_tokenizer(), name="tied", head=("classifier",))
    before = fingerprint(backbone.model)
    with FullFineTuning(backbone, Configuration()) as attachment:
        assert first.query.weight is second.query.weight
        assert first.query.weight is not shared
        assert attachment.trainable_parameters == backbone.parameters
        trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == backbone.parameters
    assert first.query.weight is shared
    assert second.query.weight is shared
    assert fingerprint(backbone.model) == before
    evaluation = tiny_evaluator(backbone).train(Configuration(learning_rate=1e-3), attachment=FullFineTuning)
    assert evaluation.evaluation.status == "complete"
    assert fingerprint(backbone.model) == before


def test_tied_weights_are_copied_once() -> None:
    backbone = Backbone(tiny_language_model("gpt2"), None, name="tied", head=())
    copied: list[object] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            copied.extend(args[:1] if func is torch.ops.aten.clone.default else ())
            return func(*args, **(kwargs or {}))

    with Watching(), FullFineTuning(backbone, Configuration()):  # type: ignore[no-untyped-call]
        assert len(copied) == len(list(backbone.model.parameters()))


def test_full_fine_tuning_has_no_adapters() -> None:
    backbone = learner()
    with pytest.raises(ValueError, match="no adapters"):
        FullFineTuning(backbone, everywhere(backbone, "lora"))
    assert backbone.attached is None


def test_a_baseline_that_never_completes_is_an_error() -> None:
    evaluator = tiny_evaluator()
    before = fingerprint(evaluator.backbone.model)
    with pytest.raises(RuntimeError, match="full fine-tuning failed: diverged"):
        full_fine_tuning(evaluator, (1e30,))
    assert fingerprint(evaluator.backbone.model) == before
    assert math.isfinite(evaluator.evaluate(Configuration(learning_rate=1e-3)).values["accuracy"])
