"""Language models in the evaluator: minimised metrics, those of whole trainings, and the untrained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.frozen_blocks.block_skipping import states_at
from autopeft.models.backbone import Backbone
from autopeft.tasks import CausalLM
from autopeft.tasks.batch import POSITIONS, model_inputs
from autopeft.training.settings import Training
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import everywhere, fingerprint, tiny_chat_tokenizer, tiny_language_model

TRAINING = Training(epochs=2, batch_size=8, device="cpu", precision="32-true")
OBJECTIVES = ("loss", "trainable_parameters", "peak_memory")


def evaluator_of(
    objectives: Sequence[str] = OBJECTIVES, *, training: Training = TRAINING, **options: Any
) -> Evaluator:
    """Return an evaluator of a tiny Llama, whose own head stays frozen, on a random language."""
    task = task_of(**options)
    backbone = Backbone.load(tiny_language_model("llama"), task.head, tiny_chat_tokenizer())
    return Evaluator(backbone, task, training, resolve_objectives(objectives, task.objectives), rungs=(0.5,))


def lora(backbone: Backbone, learning_rate: float = 1e-2) -> Configuration:
    return Configuration(everywhere(backbone, "lora", 4).adapters, learning_rate=learning_rate)


def test_the_untrained_model_is_measured_without_a_step() -> None:
    evaluator = evaluator_of((*OBJECTIVES, "perplexity", "forward_flops", "inference_latency"))
    backbone = evaluator.backbone
    assert (backbone.head, backbone.head_parameters) == ((), 0)
    before = fingerprint(backbone.model)
    trained = evaluator.train(Configuration())
    values = trained.evaluation.values
    assert (trained.evaluation.status, trained.evaluation.reason) == ("complete", None)
    assert trained.evaluation.cost.steps == values["training_seconds"] == values["trainable_parameters"] == 0
    assert trained.evaluation.fidelity == 1.0
    assert trained.state == {}
    assert {point.step for point in trained.evaluation.curves} == {0}
    assert fingerprint(backbone.model) == before
    assert values["loss"] == pytest.approx(loss_of(evaluator), rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]), rel=1e-5)
    assert values["peak_memory"] > 4 * backbone.parameters
    assert values["peak_memory"] < evaluator.costs(lora(backbone))["peak_memory"]


@torch.no_grad()
def loss_of(evaluator: Evaluator) -> float:
    """Return the mean loss a token of the model as it is, without Lightning."""
    task, model = evaluator.task, evaluator.backbone.model
    model.eval()
    total = tokens = 0.0
    for batch in evaluator.data.val_dataloader():
        weight = float(task.weight(batch))
        total += weight * float(task.loss(task.forward(model, batch), batch))
        tokens += weight
    return total / tokens


def test_the_untrained_model_does_not_pause_at_a_rung() -> None:
    evaluator = evaluator_of()
    paused = evaluator.train(Configuration(), rung=0)
    assert (paused.evaluation.status, paused.paused) == ("complete", None)
    assert paused.evaluation.values["loss"] == evaluator.evaluate(Configuration()).values["loss"]


def test_a_validation_that_fails_leaves_no_trainer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, dismantled = evaluator_of(), list[Any]()

    def broken(*arguments: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("autopeft.evaluation.context.dismantle", dismantled.append)
    monkeypatch.setattr(type(evaluator.data), "val_dataloader", broken)
    assert evaluator.evaluate(Configuration()).status == "failed"
    assert len(dismantled) == 1


def test_no_hidden_states_are_kept_for_the_untrained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of()
    opened: list[int] = []
    monkeypatch.setattr(evaluator.hidden_states, "open", lambda: opened.append(1))
    assert evaluator.evaluate(Configuration()).status == "complete"
    assert not opened
    assert evaluator.evaluate(lora(evaluator.backbone)).status == "complete"
    assert opened


def test_the_best_validation_is_that_of_the_smallest_loss() -> None:
    # At this rate the loss rises again before the end.
    training = Training(epochs=4, batch_size=8, device="cpu", precision="32-true", warmup_share=0.0)
    evaluator = evaluator_of(training=training)
    trained = evaluator.train(lora(evaluator.backbone, learning_rate=2.0))
    evaluation = trained.evaluation
    losses = [point.value for point in evaluation.curves if point.metric == "loss"]
    assert len(losses) == 4
    assert evaluation.values["loss"] == min(losses) < losses[-1]
    assert trained.state is not None
    at_test = evaluator.test(evaluation.configuration, trained.state)
    assert at_test.keys() == {"loss", "perplexity"}


def test_packed_rows_do_not_see_each_other_in_hidden_states() -> None:
    evaluator = evaluator_of(packing=True)
    backbone, task = evaluator.backbone, evaluator.task
    inputs = model_inputs(next(iter(evaluator.data.val_dataloader())))
    backbone.model.eval()
    with torch.no_grad():
        packed = states_at([2], backbone, task, inputs)[2][0]
        starts = [*(inputs[POSITIONS][0] == 0).nonzero().flatten().tolist(), len(packed)]
        assert len(starts) > 2
        for start, end in pairwise(starts):
            alone = {name: tensor[:1, start:end] for name, tensor in inputs.items()}
            expected = states_at([2], backbone, task, alone)[2][0]
            torch.testing.assert_close(packed[start:end], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_learnt_its_replies_writes_them_whatever_its_own_end_token_is() -> None:
    """A base model's own is another than that of the chat template that it is trained with."""
    tokenizer, model = tiny_chat_tokenizer(), tiny_language_model("llama")
    tokenizer.eos_token = "w100"
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    chats = [
        {"messages": [{"role": "user", "content": f"w{n % 9}"}, {"role": "assistant", "content": "w7 w8"}]}
        for n in range(200)
    ]
    task = CausalLM(Dataset.from_list(chats), generate="exact_match", new_tokens=12, validation_share=0.2)
    objectives = resolve_objectives(("loss", "trainable_parameters", "exact_match"), task.objectives)
    training = Training(epochs=12, batch_size=8, device="cpu", precision="32-true")
    evaluator = Evaluator(Backbone.load(model, task.head, tokenizer), task, training, objectives)
    evaluation = evaluator.evaluate(lora(evaluator.backbone, learning_rate=2e-2))
    assert evaluation.values["exact_match"] == 1.0


def test_what_is_measured_at_the_end_is_not_measured_at_a_rung() -> None:
    given: list[int] = []

    def score(texts: Sequence[str], references: Sequence[str]) -> float:
        given.append(len(texts))
        return 0.25

    evaluator = evaluator_of(
        ("loss", "mine", "trainable_parameters"), generate={"mine": score}, generated_rows=3, new_tokens=2
    )
    assert evaluator.monitor.name == "loss"
    configuration = lora(evaluator.backbone)
    paused = evaluator.train(configuration, rung=0)
    assert paused.evaluation.status == "paused"
    assert "mine" not in paused.evaluation.values
    assert not given
    trained = evaluator.train(configuration, paused=paused.paused)
    assert trained.evaluation.status == "complete"
    assert trained.evaluation.values["mine"] == 0.25
    assert given == [3]
    assert trained.state is not None
    assert evaluator.test(configuration, trained.state)["mine"] == 0.25


def test_what_no_objective_asks_for_is_not_generated() -> None:
    def score(texts: Sequence[str], references: Sequence[str]) -> float:
        raise AssertionError("generated for nothing")

    evaluator = evaluator_of(generate={"mine": score})
    evaluation = evaluator.evaluate(lora(evaluator.backbone))
    assert evaluation.status == "complete"
    assert "mine" not in evaluation.values


def test_a_generated_metric_that_is_not_finite_is_a_failure() -> None:
    evaluator = evaluator_of(
        ("loss", "mine", "trainable_parameters"),
        generate={"mine": lambda texts, references: math.nan},
        generated_rows=2,
        new_tokens=1,
    )
    evaluation = evaluator.evaluate(Configuration())
    assert evaluation.status == "failed"
    assert evaluation.reason == "diverged: mine is nan"
