"""Configurations to pack, and the comparison of packed outcomes with those of trainings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.run import Trained
from autopeft.models.backbone import Backbone
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from tests.learnable import tiny_evaluator
from tests.tiny_models import fingerprint, tiny_backbone

TRAINING = Training(epochs=2, batch_size=8, device="cpu", precision="32-true")
WITHOUT_DROPOUT: dict[str, dict[str, float]] = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "deberta-v2": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0},
    "llama": {},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def packing_backbone(architecture: str = "bert") -> Backbone:
    options: dict[str, Any] = {"num_hidden_layers": 4, **WITHOUT_DROPOUT[architecture]}
    return tiny_backbone(architecture, new_head=True, **options)


def packing_evaluator(architecture: str = "bert", **settings: Any) -> Evaluator:
    return tiny_evaluator(packing_backbone(architecture), **({"training": TRAINING} | settings))


def of(sites: dict[str, Any], learning_rate: float = 1e-2, weight_decay: float = 0.0) -> Configuration:
    return Configuration.from_dict(
        {"sites": sites, "learning_rate": learning_rate, "weight_decay": weight_decay}
    )


def lora(sites: str, size: int = 2, learning_rate: float = 1e-2, **options: Any) -> Configuration:
    adapter = {"method": "lora", "size": size, **options}
    return of(dict.fromkeys(sites.split(), adapter), learning_rate, 0.01)


LORAS = (
    lora("0-3.query 0-3.value", 3),
    lora("2-3.query 2-3.value 1.ffn_up", 8, 3e-3, rslora=False, alpha=16),
    lora("3.query", 1, 5e-2),
    of({}),
    lora("0.ffn_down 3.query", 2, 2e-2),
)
OTHER_METHODS = (
    of({"1-3.query": {"method": "ia3"}, "2.ffn_down": {"method": "ia3"}}),
    of({"2.attention": {"method": "prefix", "size": 3}, "3.query": {"method": "lora", "size": 2}}),
)


def assert_alike(packed: Trained, alone: Trained, tolerance: float = 1e-5) -> None:
    """Compare all of two outcomes but times.

    Adam takes whole steps also where a gradient is next to nothing and its rounding a good share of it:
    tensors may differ by a hundredth of a step.
    """
    found, expected = packed.evaluation, alone.evaluation
    assert (found.status, found.reason, found.seed) == (expected.status, expected.reason, expected.seed)
    assert found.configuration == expected.configuration
    assert (
        found.fidelity == expected.fidelity or found.status == "failed"
    )  # alone, the step that broke is not counted
    assert [(point.metric, point.step) for point in found.curves] == [
        (point.metric, point.step) for point in expected.curves
    ]
    for point, other_point in zip(found.curves, expected.curves, strict=True):
        assert point.value == pytest.approx(other_point.value, abs=tolerance), point
    assert found.values.keys() == expected.values.keys()
    for name in found.values.keys() - {"training_seconds", "examples_per_second", "inference_latency"}:
        assert found.values[name] == pytest.approx(expected.values[name], abs=tolerance), name
    if found.status == "complete":  # alone, the step at which the loss broke is not counted
        assert found.cost.steps == expected.cost.steps
    assert (packed.state is None) == (alone.state is None)
    if packed.state is not None and alone.state is not None:
        assert packed.state.keys() == alone.state.keys()
        torch.testing.assert_close(packed.state, alone.state, rtol=0, atol=max(1e-4, tolerance))


def compare(
    evaluator: Evaluator, configurations: tuple[Configuration, ...], *, tolerance: float = 1e-5, **how: Any
) -> list[Trained]:
    """Train together and one by one; the backbone must stay what it was."""
    before = fingerprint(evaluator.backbone.model)
    packed = PackedTrainer(evaluator).train(configurations, **how)
    assert fingerprint(evaluator.backbone.model) == before
    assert evaluator.backbone.attached is None
    for configuration, trained in zip(configurations, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration, **how), tolerance)
    return packed


def minilm_evaluator(folder: Path, csv: Path) -> Evaluator:
    """Return an evaluator of the real model, without dropout."""
    task = TextClassification(dataset=str(csv), train_examples=96, validation_examples=64, test_examples=50)
    backbone = Backbone.load(str(folder), task.head)
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    return Evaluator(
        backbone, task, Training(epochs=2, batch_size=16, device="cpu", precision="32-true"), objectives
    )
