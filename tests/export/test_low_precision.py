"""Base models in less than single precision: adapters are trained, saved and loaded in float32 on top."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from autopeft.export.loading import load_adapter
from autopeft.methods import attach
from autopeft.search_spaces import Uniform
from tests.exports import all_methods, difference, expected_logits, export
from tests.learnable import tiny_search
from tests.tiny_models import everywhere, tiny_backbone, tiny_batch, tiny_model, tiny_tokenizer

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
