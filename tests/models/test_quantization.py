"""Backbones whose weights are packed by bitsandbytes, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autopeft
from autopeft import Adapter, Configuration, Site, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.packed_weights import PackedLinear
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes says what its CPU kernels lack


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_language_model("llama", hidden_size=128, intermediate_size=128)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[arg-type]
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


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
    pytest.importorskip("bitsandbytes")
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
