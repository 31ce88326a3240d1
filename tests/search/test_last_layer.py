"""Searches that train of a new head its last layer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.export import export_adapter
from autopeft.export.merging import merged_model
from autopeft.export.verification import trained_logits
from autopeft.methods import attach
from autopeft.tasks.batch import model_inputs
from benchmarks.memory import measure_live_storage
from tests.learnable import tiny_evaluator, tiny_search
from tests.packed import TRAINING, assert_alike, compare, lora, packing_backbone
from tests.tiny_models import LABELS, everywhere, tiny_model, tiny_tokenizer

LAST = LABELS * 32 + LABELS
"""Parameters of the last layer; RoBERTa has one of 32 * 32 + 32 before it."""


def roberta_evaluator(**settings: Any) -> Evaluator:
    backbone = packing_backbone("roberta")
    backbone.train_head("last")
    return tiny_evaluator(backbone, **({"training": TRAINING} | settings))


def drawn(evaluator: Evaluator, configuration: Configuration, seed: int) -> dict[str, Tensor]:
    """Return the layer before the last as a seed draws it."""
    with attach(evaluator.backbone, configuration, seed) as attachment:
        state = attachment.state_dict()
    return {name: tensor for name, tensor in state.items() if name.startswith("head.classifier.dense.")}


def test_the_layer_before_it_stays_as_it_was_drawn() -> None:
    evaluator = roberta_evaluator(rungs=(0.5,))
    configuration = lora("0-3.query", 4)
    costs = evaluator.costs(configuration)
    assert costs["trainable_parameters"] - costs["adapter_parameters"] == LAST
    whole = evaluator.train(configuration, 3)
    assert whole.evaluation.status == "complete", whole.evaluation.reason
    assert whole.state is not None
    before = drawn(evaluator, configuration, 3)
    assert before.keys() == {"head.classifier.dense.weight", "head.classifier.dense.bias"}
    assert all(torch.equal(whole.state[name], tensor) for name, tensor in before.items())
    assert float(whole.state["head.classifier.out_proj.bias"].abs().max()) > 0
    paused = evaluator.train(configuration, 3, rung=0).paused
    assert paused is not None
    assert not any("dense" in name for name in paused.state.optimizer)
    resumed = evaluator.train(configuration, 3, paused=paused)
    assert_alike(resumed, whole, 0)


def test_packed_trials_train_it_as_those_alone() -> None:
    evaluator, configurations = roberta_evaluator(), (lora("0-3.query", 3), lora("2-3.value", 8, 3e-3))
    for configuration, packed in zip(configurations, compare(evaluator, configurations), strict=True):
        before = drawn(evaluator, configuration, 0)
        assert packed.state is not None
        assert all(torch.equal(packed.state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("sites", ["", "3.ffn_down"])
def test_its_memory_is_counted(sites: str) -> None:
    evaluator = roberta_evaluator()
    model, batch = evaluator.backbone.model, evaluator.data.largest_batch()
    peaks = []
    for part in ("last", "whole"):
        evaluator.backbone.train_head(part)
        with attach(evaluator.backbone, lora(sites)):
            peaks.append(MemoryCounter(model).count(batch, evaluator.task))
            model.train()
            real = measure_live_storage(model, batch, evaluator.task)
            model.eval()
            assert peaks[-1] == pytest.approx(real, rel=0.02)
    assert peaks[0] < peaks[1]


def test_an_export_has_the_whole_head_and_loads_in_plain_peft(tmp_path: Path) -> None:
    tiny_model("roberta").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    search = tiny_search(tmp_path, backbone=str(tmp_path / "base"), head="last")
    assert search.identity()["search"]["head"] == "last"
    evaluator = search.open().evaluator
    backbone, probe = evaluator.backbone, model_inputs(evaluator.data.largest_batch())
    configuration = everywhere(backbone, "lora", 2).replace(learning_rate=1e-2)
    state = evaluator.train(configuration, 4).state
    assert state is not None
    expected = trained_logits(backbone, configuration, state, probe)
    export_adapter(backbone, configuration, state, tmp_path / "out", probe=probe, verify=False)
    torch.manual_seed(99)  # another new head than any that the search has drawn
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=LABELS, pad_token_id=0
    )
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    merged = merged_model(backbone, configuration, state).eval()
    with torch.no_grad():
        for model in (loaded, merged):
            torch.testing.assert_close(model(**probe).logits, expected, rtol=0, atol=1e-4)


def test_other_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"head 'lst'.*did you mean 'last'"):
        tiny_search(tmp_path, head="lst")


def test_a_backbone_that_two_searches_share_trains_what_each_says(tmp_path: Path) -> None:
    backbone = packing_backbone("roberta")
    for head, trained in (("last", "classifier.out_proj"), ("whole", "classifier")):
        tiny_search(tmp_path, backbone=backbone, head=head).open()
        assert backbone.trained_head == (trained,)
