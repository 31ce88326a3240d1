"""Base models in less than single precision: adapters are trained, saved and loaded in float32 on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from autopeft.core.configuration import Configuration
from autopeft.export.export import export_adapter
from autopeft.export.folder_format import write_adapters
from autopeft.export.loading import load_adapter
from autopeft.export.verification import trained_logits
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import Uniform
from tests.exports import all_methods, difference, expected_logits, export, trained
from tests.learnable import tiny_search
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import (
    everywhere,
    tiny_backbone,
    tiny_batch,
    tiny_chat_tokenizer,
    tiny_language_model,
    tiny_model,
    tiny_tokenizer,
)

HALF = torch.bfloat16


@pytest.mark.slow
def test_a_model_loaded_in_bf16_is_searched_and_exported_for_plain_peft(tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base", dtype=HALF)
    search = tiny_search(
        tmp_path / "runs",
        backbone=model,
        space=Uniform(methods=("lora",), sizes={"rank": (1, 8)}, learning_rate=(1e-2, 1e-1)),
        objectives=("accuracy", "trainable_parameters"),
    )
    front = search.run(trials=2, progress=False)
    assert model.dtype == HALF
    report = search.export(front.best().number, tmp_path / "adapter")
    assert report.max_logit_difference is not None

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", dtype=HALF, num_labels=3, pad_token_id=0
    )
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batch = search.open().evaluator.data.largest_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    record = search.front().trial(front.best().number).record
    checkpoint = search.open().evaluator.train(record.evaluation.configuration, record.evaluation.seed)
    assert checkpoint.state is not None
    with attach(search.open().backbone, record.evaluation.configuration) as attachment, torch.no_grad():
        attachment.load_state_dict(checkpoint.state)
        assert {parameter.dtype for parameter in attachment.parameters.values()} == {torch.float32}
        with torch.autocast("cpu", HALF):
            expected = search.open().backbone.model.eval()(**inputs).logits.float()
    assert difference(loaded, inputs, expected) < 0.05 * float(expected.max() - expected.min())


def nothing(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return state


def all_of_it(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor * ("lora_B" not in name) for name, tensor in state.items()}


def half_of_each(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor / (2 if "lora_B" in name else 1) for name, tensor in state.items()}


def those_of_a_block(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor * (not name.startswith("0.")) for name, tensor in state.items()}


@pytest.mark.parametrize("lost", [nothing, all_of_it, half_of_each, those_of_a_block])
def test_what_is_lost_of_an_adapter_is_noticed_on_a_bf16_base(
    lost: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The adapter changes the logits by less than rounding may move one of them."""

    def write(folder: Path, placements: Any, state: Mapping[str, Tensor], **options: Any) -> None:
        write_adapters(folder, placements, lost(state), **options)

    monkeypatch.setattr("autopeft.export.export.write_adapters", write)
    model: Any = tiny_language_model("llama")
    model.lm_head.weight.data.mul_(4)  # logits as large as those of real models
    nn.Module.to(model, HALF)
    backbone = Backbone.load(model, task_of().head, tiny_chat_tokenizer())
    configuration = everywhere(backbone, "lora")
    state = trained(backbone, configuration, std=0.005)
    probe = tiny_batch()
    expected, without = (
        trained_logits(backbone, point, tensors, probe)
        for point, tensors in ((configuration, state), (Configuration(), {}))
    )
    assert (expected - without).abs().max() < 0.1 * (expected.max() - expected.min())
    with nullcontext() if lost is nothing else pytest.raises(RuntimeError, match="does not reproduce"):
        export_adapter(backbone, configuration, state, tmp_path / "out", probe=probe, fresh=False)


@pytest.mark.parametrize("target", ["autopeft", pytest.param("merged", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_exports_of_a_bf16_base_reproduce_it(architecture: str, target: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(architecture)
    backbone.model.bfloat16()
    configuration = everywhere(backbone, "lora") if target == "merged" else all_methods(backbone)
    report = export(backbone, configuration, tmp_path / "out", target=target)
    assert report.max_logit_difference is not None
    if target != "merged":
        base = tiny_backbone(architecture).model.bfloat16()
        expected = expected_logits(backbone, configuration)
        loaded = load_adapter(base, tmp_path / "out")
        assert difference(loaded, tiny_batch(), expected) < 0.1 * float(expected.max() - expected.min())
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {HALF}
