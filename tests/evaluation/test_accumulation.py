"""A batch in parts: the gradients, steps and outcomes of the whole batch, in less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import resolve_objectives
from autopeft.core.precision import autocast
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.evaluation.run import Trained
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.tasks import Task
from autopeft.training.accumulation import with_shares
from autopeft.training.settings import Training
from tests.learnable import learnable_task
from tests.packed import assert_alike, compare, lora, packing_backbone, packing_evaluator
from tests.task_cases import TASK_CASES
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import everywhere, tiny_chat_tokenizer, tiny_language_model

TRAINING = Training(epochs=2, batch_size=8, device="cpu", precision="32-true")
PARTS = 4
TASKS: dict[str, Task] = {
    "classes of unlike weights": learnable_task(rows=44, class_weights={"a": 3.0, "b": 0.5}),
    "a class without weight": learnable_task(rows=44, class_weights={"a": 0.0}),
    "completions of unlike lengths": task_of(50),
    "pairs of replies": TASK_CASES["PreferenceOptimization"].make(),
}


def evaluator_of(task: Task, cache: Path | None = None, **settings: Any) -> Evaluator:
    if task.head.is_trained:
        backbone = packing_backbone()
    else:
        backbone = Backbone.load(tiny_language_model("llama"), task.head, tiny_chat_tokenizer())
    names = task.metrics[0].name, "trainable_parameters", "peak_memory"
    objectives = resolve_objectives(names, task.metrics)
    training = replace(TRAINING, **settings)
    return Evaluator(backbone, task, training, objectives, rungs=(0.3,), cache=cache)


def loras(evaluator: Evaluator) -> Configuration:
    return everywhere(evaluator.backbone, "lora", 4).replace(learning_rate=1e-2)


def gradients_of(evaluator: Evaluator) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and the gradients of the first training batches, without steps between them."""
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    with attach(evaluator.backbone, loras(evaluator)) as attachment:
        module = evaluator.module(loras(evaluator)).train()
        optimizer = torch.optim.AdamW(attachment.parameters.values())
        for batch in evaluator.batches(0):
            with autocast(evaluator.training.resolved_precision(), "cpu"):
                loss = module.training_step(batch, 0)
            module.optimizer_zero_grad(0, 0, optimizer)  # frees those of the batch before
            loss.backward()
            for name, parameter in attachment.parameters.items():
                assert parameter.grad is not None
                gradients[f"batch {len(losses)}: {name}"] = parameter.grad.clone()
            losses.append(float(loss.detach()))
        module.eval()
    return losses, gradients


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({}, 1e-5), ({"gradient_checkpointing": True}, 1e-5), ({"precision": "bf16-mixed"}, 0.02)],
    ids=("single", "checkpointing", "bf16"),
)
@pytest.mark.parametrize("name", TASKS)
def test_the_parts_gradients_are_those_of_the_batch(
    name: str, settings: dict[str, Any], tolerance: float
) -> None:
    losses, gradients = gradients_of(evaluator_of(TASKS[name], **settings))
    in_parts, added = gradients_of(evaluator_of(TASKS[name], accumulate=PARTS, **settings))
    assert len(losses) > 2
    assert in_parts == pytest.approx(losses, rel=tolerance)
    for gradient_name, gradient in gradients.items():
        difference = (added[gradient_name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert float(difference) <= tolerance, gradient_name


def test_parts_without_weight_are_left_out() -> None:
    evaluator = evaluator_of(TASKS["a class without weight"], accumulate=PARTS)
    batches = [parts for parts in evaluator.batches(0) if isinstance(parts, list)]
    counts = [(len(parts), len(with_shares(evaluator.task, parts))) for parts in batches]
    assert any(kept < count for count, kept in counts)


def test_a_step_has_the_same_rows_in_parts() -> None:
    whole, parted = (evaluator_of(TASKS["completions of unlike lengths"], accumulate=k) for k in (1, PARTS))
    assert parted.plan == whole.plan
    assert parted.steps_per_epoch * PARTS >= parted.data.batches_per_epoch > parted.steps_per_epoch
    for batch, parts in zip(whole.batches(3), parted.batches(3), strict=True):
        assert isinstance(batch, dict)
        assert isinstance(parts, list)
        assert len(parts) <= PARTS
        assert all(len(part["labels"]) <= TRAINING.batch_size // PARTS for part in parts)
        rows = torch.cat([part["rows of train"] for part in parts])
        assert torch.equal(rows, batch["rows of train"])
        widths = [part["input_ids"].shape[1] for part in parts]
        assert max(widths) == batch["input_ids"].shape[1]
        assert sum(share for share, _ in with_shares(whole.task, parts)) == pytest.approx(1)


def test_an_outcome_is_that_of_whole_batches_and_a_pause_changes_nothing() -> None:
    task = TASKS["completions of unlike lengths"]
    whole, parted = (evaluator_of(task, accumulate=k, epochs=1) for k in (1, PARTS))
    configuration = loras(whole)
    uncut = parted.train(configuration)
    assert uncut.evaluation.cost.steps == parted.plan.total_steps
    alone = whole.train(configuration)
    less_memory = uncut.evaluation.values["peak_memory"], alone.evaluation.values["peak_memory"]
    assert less_memory[0] < less_memory[1]
    assert_alike(_without_memory(uncut), _without_memory(alone), 1e-3)
    paused = parted.train(configuration, rung=0).paused
    assert paused is not None
    assert paused.step == parted.plan.rungs[0]
    resumed = parted.train(configuration, paused=paused)
    assert uncut.state is not None
    assert resumed.state is not None
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in uncut.state.items())
    assert resumed.evaluation.curves == uncut.evaluation.curves


def _without_memory(trained: Trained) -> Trained:
    values = {name: value for name, value in trained.evaluation.values.items() if name != "peak_memory"}
    return replace(trained, evaluation=replace(trained.evaluation, values=values))


@pytest.mark.parametrize(
    ("name", "accumulate", "settings"),
    [
        ("classes of unlike weights", PARTS, {}),
        ("completions of unlike lengths", 1, {}),
        ("completions of unlike lengths", 2, {"gradient_checkpointing": True}),
        ("completions of unlike lengths", PARTS, {}),
        ("completions of unlike lengths", PARTS, {"precision": "bf16-mixed"}),
        pytest.param("pairs of replies", 2, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_memory_is_counted_as_it_is(name: str, accumulate: int, settings: dict[str, Any]) -> None:
    evaluator = evaluator_of(TASKS[name], accumulate=accumulate, **settings)
    largest = evaluator.data.largest_batch()
    parts = [{name: tensor.clone() for name, tensor in largest.items()} for _ in range(accumulate)]
    model, counter = evaluator.backbone.model, StorageCounter()
    with attach(evaluator.backbone, loras(evaluator)) as attachment:
        counted = evaluator.peak_bytes(attachment)
        module = evaluator.module(loras(evaluator)).train()
        optimizer = torch.optim.AdamW(attachment.parameters.values())
        inputs = [tensor for part in parts for tensor in part.values()]
        base = counter.exclude((*inputs, *model.parameters(), *model.buffers()))
        with counter:
            for _ in range(2):
                with autocast(evaluator.training.resolved_precision(), "cpu"):
                    loss = module.training_step(parts if accumulate > 1 else parts[0], 0)
                module.optimizer_zero_grad(0, 0, optimizer)
                loss.backward()
                del loss
                optimizer.step()
        module.eval()
    assert counted == pytest.approx(base + counter.peak_bytes, rel=0.015)


@pytest.mark.slow
def test_packed_trials_are_those_alone() -> None:
    evaluator = packing_evaluator(training=replace(TRAINING, epochs=1, accumulate=2))
    compare(evaluator, (lora("0-3.query 0-3.value", 3), lora("2-3.query 1.ffn_up", 8, 3e-3)))


@pytest.mark.slow
def test_hidden_states_are_served_to_parts(tmp_path: Path) -> None:
    task = TASKS["classes of unlike weights"]
    settings: dict[str, Any] = {"accumulate": PARTS, "epochs": 4}
    cached = evaluator_of(task, tmp_path, **settings)
    on_top = lora("3.query 3.value", 4)
    served = cached.train(on_top)
    assert [use.cut for use in cached.hidden_states.uses] == [3]
    assert_alike(served, evaluator_of(task, frozen_blocks="eval", **settings).train(on_top))
