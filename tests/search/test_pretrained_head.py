"""Searches that train the output layer that a language model came with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from autopeft import Search, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.export.export import export_adapter
from autopeft.export.merging import merged_model
from autopeft.export.targets import possible_targets
from autopeft.export.verification import trained_logits
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import Uniform
from autopeft.tasks.batch import model_inputs
from benchmarks.memory import measure_live_storage
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import (
    VOCABULARY,
    everywhere,
    tiny_backbone,
    tiny_chat_tokenizer,
    tiny_language_model,
    tiny_model,
)

LAYER = VOCABULARY * 32
TRAINING = Training(epochs=1, batch_size=8, device="cpu", precision="32-true")


def language_backbone(architecture: str = "llama") -> Backbone:
    return Backbone.load(tiny_language_model(architecture), task_of().head, tiny_chat_tokenizer())


def test_it_is_trained_in_a_copy_and_counted() -> None:
    backbone, task = language_backbone(), task_of()
    fingerprint = backbone.fingerprint
    backbone.train_head("pretrained")
    names = ("loss", "trainable_parameters", "peak_memory")
    evaluator = Evaluator(backbone, task, TRAINING, resolve_objectives(names, task.metrics))
    configuration = everywhere(backbone, "lora", 2).replace(learning_rate=1e-2)
    costs = evaluator.costs(configuration)
    assert costs["trainable_parameters"] - costs["adapter_parameters"] == LAYER
    before = backbone.model.get_parameter("lm_head.weight").clone()
    state = evaluator.train(configuration).state
    assert state is not None
    assert not torch.equal(state["head.lm_head.weight"], before)
    assert torch.equal(backbone.model.get_parameter("lm_head.weight"), before)
    with attach(backbone, configuration):
        real = measure_live_storage(backbone.model.train(), evaluator.data.largest_batch(), task)
    assert costs["peak_memory"] == pytest.approx(real + 4 * LAYER, rel=0.02), "and its own weights stay"
    backbone.train_head("whole")
    assert evaluator.costs(configuration)["trainable_parameters"] == costs["adapter_parameters"]
    vars(backbone).pop("fingerprint")  # so that it is computed again
    assert backbone.fingerprint == fingerprint


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_an_export_has_it_and_loads_in_plain_peft(
    dtype: Literal["float32", "bfloat16"], tolerance: float, tmp_path: Path
) -> None:
    tiny_language_model("llama").save_pretrained(tmp_path / "base")
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    search = Search(
        str(tmp_path / "base"),
        task_of(),
        Uniform(sizes={"rank": (1, 2)}),
        objectives=("loss", "trainable_parameters"),
        training=TRAINING,
        tracking=None,
        folder=tmp_path,
        dtype=dtype,
        head="pretrained",
    )
    assert search.identity()["search"]["head"] == "pretrained"  # an export was rehearsed
    backbone, evaluator = search.open().backbone, search.open().evaluator
    configuration = everywhere(backbone, "lora", 2).replace(learning_rate=1e-2)
    assert "vllm" not in possible_targets(backbone, configuration)
    state = evaluator.train(configuration).state
    assert state is not None
    probe = model_inputs(evaluator.data.largest_batch())
    expected = trained_logits(backbone, configuration, state, probe)
    export_adapter(backbone, configuration, state, tmp_path / "out", probe=probe, verify=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=backbone.model.dtype)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    merged = merged_model(backbone, configuration, state).eval()
    spread = float(expected.max() - expected.min())
    trained = state["head.lm_head.weight"].to(backbone.model.dtype)
    assert not torch.equal(trained, backbone.model.get_parameter("lm_head.weight"))
    with torch.no_grad():
        for found in (loaded, merged):
            torch.testing.assert_close(
                found(**probe).logits.float(), expected, rtol=0, atol=tolerance * spread
            )
            assert any(torch.equal(each.float(), trained.float()) for each in found.parameters())


@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        (lambda: language_backbone("gemma2"), r"lm_head is tied to model\.embed_tokens\.weight, which stays"),
        (lambda: tiny_backbone("bert"), r"the head of this task \(classifier\) is trained by head='whole'"),
        (lambda: Backbone(tiny_model("bert"), None, name="tiny", head=()), "BertModel has none"),
    ],
)
def test_what_cannot_be_trained_apart_is_refused(backbone: Any, why: str) -> None:
    with pytest.raises(ValueError, match=rf"a language model's own output layer: {why}"):
        backbone().train_head("pretrained")


def test_a_quantised_layer_is_refused() -> None:
    backbone = language_backbone()
    backbone.quantized["lm_head"] = 4
    with pytest.raises(ValueError, match="lm_head is quantised"):
        backbone.train_head("pretrained")
