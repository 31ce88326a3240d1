"""What a task that trains without the model's own dropout leaves of it for whoever has the model next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch import Callback
from transformers import PreTrainedModel

from autopeft import Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.rehearsal import rehearse
from autopeft.export.export import export_adapter
from autopeft.models.backbone import Backbone
from autopeft.search_identity import source_settings
from autopeft.tasks import Task
from tests.task_cases import TASK_CASES
from tests.tasks.test_causal_lm import task_of
from tests.tasks.test_causal_lm_contract import lora
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model


class Rates(Callback):
    """Notes the rates that a training has, of a module and in the config."""

    seen: ClassVar[set[tuple[float, float]]] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = pl_module.model
        self.seen.add((model.transformer.drop.p, model.config.attn_pdrop))


def evaluator_of(model: PreTrainedModel, task: Task) -> Evaluator:
    backbone = Backbone.load(model, task.head, tiny_chat_tokenizer())
    training = Training(epochs=1, batch_size=8, device="cpu", callbacks=[Rates])
    return Evaluator(backbone, task, training, resolve_objectives(("loss", "peak_memory"), task.metrics))


def test_a_training_without_dropout_leaves_it_in_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_language_model("gpt2")
    before = source_settings(model)
    evaluator = evaluator_of(model, TASK_CASES["PreferenceOptimization"].make())
    configuration = lora(evaluator.backbone)
    costs = evaluator.costs(configuration)
    for train in (rehearse, Evaluator.train):
        monkeypatch.setattr(Rates, "seen", set())
        trained: Any = train(evaluator, configuration)
        assert Rates.seen == {(0.0, 0.0)}
    assert trained.evaluation.values["peak_memory"] == costs["peak_memory"]

    assert source_settings(model) == before  # by which a second search resumes
    export_adapter(
        evaluator.backbone,
        configuration,
        trained.state,
        tmp_path / "merged",
        probe=evaluator.model_call(),
        target="merged",
        verify=False,
    )
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["attn_pdrop"] == 0.1

    monkeypatch.setattr(Rates, "seen", set())
    evaluator_of(model, task_of(24)).train(configuration)
    assert Rates.seen == {(0.1, 0.1)}
