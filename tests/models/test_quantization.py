"""Backbones whose weights are packed by bitsandbytes, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autopeft
from autopeft import Adapter, Configuration, Site, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.packed_weights import PackedLinear
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions, Quantization
from tests.quantized import QUANTIZATIONS, quantized, quiet, save_base
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import tiny_batch

pytestmark = quiet


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.models.loading.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'autopeft\[quantization\]'"):
        LoadOptions(quantization="nf4")


def test_unknown_choices_are_named() -> None:
    with pytest.raises(ValueError, match=r"quantization 'nf5'.*nf4"):
        LoadOptions(quantization="nf5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype 'bf16'.*bfloat16"):
        LoadOptions(dtype="bf16")  # type: ignore[arg-type]


def test_a_packed_backbone_trains_is_counted_and_exports(base: Path, tmp_path: Path) -> None:
    task = task_of(60)
    backbone = Backbone.load(base, task.head, options=LoadOptions(quantization="nf4"))
    site = Site(1, "query")
    layer = backbone.model.get_submodule(backbone.shape(site).module)
    assert isinstance(layer, torch.nn.Linear)
    assert layer.weight.dtype == torch.uint8
    evaluator = Evaluator(
        backbone,
        task,
        Training(epochs=3, batch_size=8, device="cpu"),
        resolve_objectives(("loss", "trainable_parameters", "peak_memory"), task.metrics),
    )
    adapters = {site: Adapter("lora", 4), Site(1, "ffn"): Adapter("series", 4)}
    configuration = Configuration(adapters, learning_rate=1e-2)
    untrained = evaluator.evaluate(Configuration())
    trained = evaluator.train(configuration)
    assert trained.evaluation.status == "complete", trained.evaluation.reason
    assert trained.evaluation.values["loss"] < untrained.values["loss"]
    assert trained.evaluation.values["peak_memory"] > 0
    with attach(backbone, configuration) as attachment:
        assert {parameter.dtype for parameter in attachment.parameters.values()} == {torch.float32}
    assert PackedLinear.like(layer).weight.nbytes == layer.weight.nbytes
    assert isinstance(autopeft.estimate(base, nf4=True, methods=("lora",)).weight_bytes, int)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_predictions_change_nothing_and_gradients_flow_afterwards(
    quantization: Quantization, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On processors with AVX512-BF16 bitsandbytes rearranges 4-bit weights when they first predict.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    backbone = quantized(base, quantization, task_of(24))
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    embedded = backbone.model.get_input_embeddings()(tiny_batch()["input_ids"])
    with torch.no_grad():
        backbone.model.eval()(inputs_embeds=embedded)
    embedded.requires_grad_()
    backbone.model.train()(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.any())
    after = backbone.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_weights_that_were_rearranged_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = quantized(base, "nf4", task_of(24))
    layer: Any = backbone.model.get_submodule(backbone.shape(Site(0, "query")).module)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"q_proj were rearranged for inference.*made no predictions"):
        Backbone.load(backbone.model, task_of(24).head, backbone.tokenizer)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_parameters_are_the_numbers_that_weights_stand_for(quantization: Quantization, base: Path) -> None:
    task = task_of(24)
    packed, plain = quantized(base, quantization, task), quantized(base, None, task)
    assert packed.parameters == plain.parameters
    assert packed.sites == plain.sites
    assert len(packed.quantized) == sum(shape.kind == "linear" for shape in plain.sites.values())
