"""Adapters on blocks without attention: state spaces, recurrences, convolutions."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from autopeft.core.configuration import Configuration, Site
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import compute_scores
from benchmarks.memory import measure_live_storage
from tests.every_method import METHODS_BY_DEFAULT, ON_STATE_SPACES
from tests.exports import trained
from tests.loss_task import CROSS_ENTROPY
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import OPTIONS, draw_parameters, everywhere, fingerprint, places, tiny_batch

CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "num_labels": 3}
ARCHITECTURES = ("mamba", "mamba2", "rwkv", "jamba", "xlnet", "convnext")


@cache
def backbone_of(architecture: str) -> Backbone:
    is_image = architecture == "convnext"
    options = CONVNEXT if is_image else OPTIONS[architecture]
    auto_class: Any = AutoModelForImageClassification if is_image else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(architecture, **options)).eval()
    draw_parameters((each for each in model.parameters() if each.ndim > 1), std=0.1)
    return Backbone(model, None, name=f"tiny-{architecture}", head=(), new_head=False)


def batch_of(architecture: str) -> dict[str, Tensor]:
    if architecture == "convnext":
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    ids = tiny_batch(padding=0)["input_ids"]
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_adapter_is_trained_and_goes_without_a_trace(architecture: str) -> None:
    backbone, batch = backbone_of(architecture), batch_of(architecture)
    task = CROSS_ENTROPY if architecture == "convnext" else task_of()
    methods = [
        method
        for method in (*METHODS_BY_DEFAULT, *ON_STATE_SPACES)
        if places(backbone, method) and (method, architecture) != ("ladder", "xlnet")  # see test_ladder.py
    ]
    assert {"layernorm", "lora"} <= {*methods}
    before = fingerprint(backbone.model)
    for method in methods:
        configuration = everywhere(backbone, method)
        state = trained(backbone, configuration)
        with attach(backbone, configuration) as attachment:
            attachment.load_state_dict(state)
            task.loss(task.forward(backbone.model, batch), batch).backward()
            gradients = {name: each.grad for name, each in attachment.parameters.items()}
        assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
        assert fingerprint(backbone.model) == before


def test_the_sites_that_methods_find() -> None:
    assert {site.role for site in places(backbone_of("mamba"), "lora")} == {"mixer.in_proj"}
    assert {site.role for site in places(backbone_of("mamba"), "bitfit")} == {"convolution"}
    assert {site.role for site in places(backbone_of("convnext"), "parallel")} == {"ffn"}
    assert {site.role for site in places(backbone_of("xlnet"), "layernorm")} == {"attention_norm", "ffn_norm"}
    assert Site(0, "attention.receptance") in places(backbone_of("rwkv"), "lora")


@pytest.mark.parametrize("architecture", ["mamba", "rwkv", "convnext"])
def test_memory_is_counted_and_sites_are_scored(architecture: str) -> None:
    backbone, batch = backbone_of(architecture), batch_of(architecture)
    task = CROSS_ENTROPY if architecture == "convnext" else task_of()
    with attach(backbone, everywhere(backbone, "lora")):
        counted = MemoryCounter(backbone.model).count(batch, task)
        backbone.model.train()
        assert counted == measure_live_storage(backbone.model, batch, task)
        backbone.model.eval()
    scores = compute_scores(backbone, [batch], task, ("gradient_norm", "explained_variance"))
    for found in scores.values():
        assert all(found.values[site] > 0 for site in places(backbone, "lora"))


def test_a_configuration_names_modules() -> None:
    configuration = everywhere(backbone_of("mamba"), "lora")
    text = configuration.to_yaml()
    assert "0.mixer.in_proj:" in text
    assert Configuration.from_yaml(text) == configuration
    assert "mixer.in_proj" in configuration.grid()
