"""Backbones whose weights are packed by bitsandbytes, on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from autopeft import Adapter, Configuration, Site, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions, Quantization
from tests.exports import all_methods
from tests.quantized import QUANTIZATIONS, quantized, quiet, require_bitsandbytes, save_base
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import head_spec, tiny_batch, tiny_model, tiny_tokenizer

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


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_adapters_of_every_method_are_in_float32_and_train(quantization: Quantization, base: Path) -> None:
    task = task_of(60)
    evaluator = Evaluator(
        quantized(base, quantization, task),
        task,
        Training(epochs=3, batch_size=8, device="cpu"),
        resolve_objectives(("loss", "trainable_parameters"), task.metrics),
    )
    configuration = all_methods(evaluator.backbone).replace(learning_rate=1e-2)
    assert {"lora", "ia3", "layernorm", "series", "parallel", "prefix"} <= set(configuration.methods)
    trained = evaluator.train(configuration)
    assert trained.evaluation.status == "complete", trained.evaluation.reason
    assert trained.evaluation.values["loss"] < evaluator.evaluate(Configuration()).values["loss"]
    assert trained.state is not None
    assert {tensor.dtype for tensor in trained.state.values()} == {torch.float32}


def test_biases_of_quantised_layers_are_not_trained(tmp_path: Path) -> None:
    backbone = quantized(save_base(tmp_path / "base", "gpt2"), "int8", task_of(24))
    obstacle = backbone.obstacle(backbone.shape(Site(0, "qkv")), "bitfit")
    assert obstacle == "bitsandbytes casts the bias of transformer.h.0.attn.c_attn, which it quantised"
    assert backbone.obstacle(backbone.shape(Site(0, "ffn_norm")), "bitfit") is None


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_hidden_states_are_kept_of_4_bits_alone(
    quantization: Quantization, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    task = task_of(40)
    backbone = quantized(base, quantization, task, dtype="float32")
    configuration = Configuration({Site(1, "value"): Adapter("lora", 2)}, learning_rate=1e-2)
    losses = []
    for mode in ("cached", "eval"):
        training = Training(epochs=3, batch_size=8, device="cpu", precision="32-true", frozen_blocks=mode)
        objectives = resolve_objectives(("loss", "trainable_parameters"), task.metrics)
        evaluator = Evaluator(backbone, task, training, objectives, cache=tmp_path)
        losses.append(evaluator.evaluate(configuration).values["loss"])
        is_served = mode == "cached" and quantization == "nf4"
        assert [use.cut for use in evaluator.hidden_states.uses] == [1] * is_served
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert ("of an 8-bit backbone: they depend on the whole batch" in caplog.text) == (quantization == "int8")


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
        Backbone.load(backbone.model, task_of(24).head, backbone.processor)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_parameters_are_the_numbers_that_weights_stand_for(quantization: Quantization, base: Path) -> None:
    task = task_of(24)
    packed, plain = quantized(base, quantization, task), quantized(base, None, task)
    assert packed.parameters == plain.parameters
    assert packed.sites == plain.sites
    assert len(packed.quantized) == sum(shape.kind == "linear" for shape in plain.sites.values())


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_what_lies_outside_the_blocks_is_not_quantised(architecture: str, tmp_path: Path) -> None:
    require_bitsandbytes()
    tiny_model(architecture).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, head_spec(), options=LoadOptions(quantization="nf4"))
    linear = {shape.module for shape in backbone.sites.values() if shape.kind == "linear"}
    assert backbone.quantized == dict.fromkeys(linear, 4)
    with torch.no_grad():
        assert backbone.model(**tiny_batch()).logits.isfinite().all()
