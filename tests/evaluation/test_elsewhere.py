"""What another process makes of an evaluator that it is sent."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from tests.learnable import learnable_task, save_tiny_model, tiny_evaluator
from tests.tiny_models import tiny_classifier, tiny_tokenizer


def evaluator_of(backbone: Backbone) -> Evaluator:
    return tiny_evaluator(backbone, objectives=("accuracy", "trainable_parameters"))


def has_weights(sent: bytes, backbone: Backbone) -> bool:
    weights = next(backbone.model.parameters()).detach()
    return weights.numpy().tobytes()[:64] in sent


def test_a_backbone_that_has_a_name_is_loaded_there_and_not_sent(tmp_path: Path) -> None:
    backbone = Backbone.load(save_tiny_model(tmp_path), learnable_task().head)
    backbone.train_head("last")
    sent = pickle.dumps(evaluator_of(backbone))
    assert not has_weights(sent, backbone)
    there = pickle.loads(sent)
    assert there.compute == evaluator_of(backbone).compute
    assert there.backbone.trained_head == backbone.trained_head
    heads = [each.model.get_submodule(each.head[0]).state_dict() for each in (backbone, there.backbone)]
    assert all(torch.equal(tensor, heads[1][name]) for name, tensor in heads[0].items())


def test_a_loaded_model_is_sent() -> None:
    backbone = Backbone.load(tiny_classifier("bert"), learnable_task().head, tiny_tokenizer())
    sent = pickle.dumps(evaluator_of(backbone))
    assert has_weights(sent, backbone)
    assert pickle.loads(sent).compute == evaluator_of(backbone).compute


def test_what_auto_stands_for_there_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in bfloat16, which the processor of one of the two processes multiplies."""
    save_tiny_model(tmp_path)
    tiny_classifier("bert").bfloat16().save_pretrained(tmp_path)
    monkeypatch.setattr("autopeft.models.loading.quickest_precision", lambda device: "32-true")
    here = evaluator_of(Backbone.load(tmp_path, learnable_task().head))
    sent = pickle.dumps(here)
    monkeypatch.setattr("autopeft.models.loading.quickest_precision", lambda device: "bf16-mixed")
    there = pickle.loads(sent)
    found = [(each.compute.dtype, each.compute.precision) for each in (here, there)]
    assert found == [("float32", "32-true"), ("bfloat16", "bf16-mixed")]
    assert here.compute != there.compute


def test_a_host_with_other_files_shows(tmp_path: Path) -> None:
    here = evaluator_of(Backbone.load(save_tiny_model(tmp_path), learnable_task().head))
    sent = pickle.dumps(here)
    other = tiny_classifier("bert")
    torch.nn.init.zeros_(other.get_parameter("bert.embeddings.word_embeddings.weight"))
    other.save_pretrained(tmp_path)
    assert pickle.loads(sent).compute != here.compute
