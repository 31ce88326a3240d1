"""Evaluator: what an evaluation measures, and that whatever happens the backbone is left as it was."""

from __future__ import annotations

import logging
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from autopeft.callbacks import LearningCurve
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.training.settings import Training
from tests.learnable import OBJECTIVES, TRAINING, learner, tiny_evaluator
from tests.tiny_models import everywhere, fingerprint, logits_of


def lora(backbone: Backbone, rank: int = 4, learning_rate: float = 1e-2) -> Configuration:
    adapters = everywhere(backbone, "lora", rank).adapters
    return Configuration(adapters, learning_rate=learning_rate)


@contextmanager
def in_training_forward(evaluator: Evaluator, step: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something in the n-th forward pass that trains, inside the model."""
    passes = 0

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        nonlocal passes
        # Memory is counted beforehand, on tensors without values.
        if module.training and type(output.logits) is torch.Tensor and not output.logits.is_meta:
            passes += 1
            if passes == step:
                act()

    handle = evaluator.backbone.model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def failing(act: Callable[[], None], step: int = 3) -> tuple[Evaluation, Evaluator]:
    """Evaluate with something going wrong in training; the backbone must be what it was."""
    evaluator = tiny_evaluator()
    backbone = evaluator.backbone
    before, logits = fingerprint(backbone.model), logits_of(backbone)
    with in_training_forward(evaluator, step, act):
        evaluation = evaluator.evaluate(lora(backbone))
    assert backbone.attached is None
    assert fingerprint(backbone.model) == before
    assert torch.equal(logits_of(backbone), logits)
    return evaluation, evaluator


def test_a_complete_evaluation_has_every_objective() -> None:
    names = ("accuracy", "f1", "trainable_parameters", "peak_memory", "forward_flops")
    evaluator = tiny_evaluator(objectives=(*names, "training_seconds", "inference_latency"))
    configuration = lora(evaluator.backbone)
    before = fingerprint(evaluator.backbone.model)
    trained = evaluator.train(configuration)
    evaluation = trained.evaluation
    assert (evaluation.status, evaluation.reason) == ("complete", None)
    assert {*names, "matthews", "training_seconds", "inference_latency"} <= evaluation.values.keys()
    assert evaluation.values["trainable_parameters"] == count_parameters(evaluator.backbone, configuration)
    assert all(evaluation.values[name] > 0 for name in evaluator.needed)
    assert {point.metric for point in evaluation.curves} >= {"accuracy"}
    assert trained.state is not None
    assert sum(tensor.numel() for tensor in trained.state.values()) == count_parameters(
        evaluator.backbone, configuration
    )
    assert fingerprint(evaluator.backbone.model) == before


def test_costs_before_training_are_those_of_the_evaluation() -> None:
    evaluator = tiny_evaluator()
    configuration = lora(evaluator.backbone)
    costs = evaluator.costs(configuration)
    assert costs.keys() == {"trainable_parameters", "adapter_parameters", "adapter_bytes", "peak_memory"}
    head = evaluator.backbone.head_parameters
    assert costs["adapter_parameters"] == costs["trainable_parameters"] - head > 0
    values = evaluator.evaluate(configuration).values
    assert {name: values[name] for name in costs} == costs


def test_training_learns() -> None:
    evaluator = tiny_evaluator(
        rows=96, training=Training(epochs=6, batch_size=8, device="cpu", precision="32-true")
    )
    assert evaluator.evaluate(lora(evaluator.backbone)).values["accuracy"] > 0.6


def test_the_same_seed_gives_the_same_values_and_another_does_not() -> None:
    evaluator = tiny_evaluator()
    configuration = lora(evaluator.backbone)
    first, again, other = (evaluator.train(configuration, seed) for seed in (None, 0, 1))
    assert (first.evaluation.seed, other.evaluation.seed) == (0, 1)
    assert first.state is not None
    assert again.state is not None
    assert other.state is not None
    for name, tensor in first.state.items():
        assert torch.equal(tensor, again.state[name])
    assert any(not torch.equal(tensor, other.state[name]) for name, tensor in first.state.items())
    assert first.evaluation.curves == again.evaluation.curves != other.evaluation.curves
    assert first.evaluation.values["accuracy"] == again.evaluation.values["accuracy"]
    fresh = tiny_evaluator().evaluate(configuration)
    assert fresh.curves == first.evaluation.curves


def test_an_evaluation_leaves_the_random_generator_alone() -> None:
    evaluator = tiny_evaluator()
    state = torch.get_rng_state()
    evaluator.evaluate(lora(evaluator.backbone))
    assert torch.equal(torch.get_rng_state(), state)


def test_cost_counts_steps_and_time() -> None:
    evaluator = tiny_evaluator()
    cost = evaluator.evaluate(lora(evaluator.backbone)).cost
    assert cost.steps == 48 // 8
    assert cost.wall_seconds > 0
    assert cost.cpu_seconds > 0
    assert cost.gpu_seconds == 0
    bounded = tiny_evaluator(
        training=Training(epochs=1, batch_size=8, max_steps=2, device="cpu", precision="32-true")
    )
    evaluation = bounded.evaluate(lora(bounded.backbone))
    assert (evaluation.status, evaluation.cost.steps) == ("complete", 2)


def test_a_loss_that_is_not_finite_is_a_divergence() -> None:
    evaluator = tiny_evaluator()
    before = fingerprint(evaluator.backbone.model)
    trained = evaluator.train(lora(evaluator.backbone, learning_rate=1e30))
    assert trained.state is None
    assert trained.evaluation.status == "failed"
    assert trained.evaluation.reason is not None
    assert trained.evaluation.reason.startswith("diverged")
    assert {"trainable_parameters", "peak_memory"} <= trained.evaluation.values.keys()
    assert fingerprint(evaluator.backbone.model) == before


def test_an_exception_in_the_model_is_an_outcome() -> None:
    def act() -> None:
        raise RuntimeError("the wire came loose\nand more")

    evaluation, evaluator = failing(act)
    assert evaluation.status == "failed"
    assert evaluation.reason == "RuntimeError: the wire came loose"
    assert evaluation.cost.steps == 2
    assert evaluator.evaluate(lora(evaluator.backbone)).status == "complete"


def test_too_little_memory_is_an_outcome() -> None:
    def act() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    evaluation, evaluator = failing(act)
    assert evaluation.status == "failed"
    assert evaluation.reason is not None
    assert evaluation.reason.startswith("out of memory")
    assert evaluator.evaluate(lora(evaluator.backbone)).status == "complete"


@pytest.mark.parametrize("bounded", ["trainable_parameters", "adapter_parameters"])
def test_an_infeasible_candidate_is_not_trained(bounded: str) -> None:
    backbone = learner()
    small, large = lora(backbone, 1), lora(backbone, 8)
    head = backbone.head_parameters if bounded == "adapter_parameters" else 0
    bound = count_parameters(backbone, small) - head
    evaluator = tiny_evaluator(backbone, constraints={bounded: bound})
    trained = evaluator.train(large)
    assert trained.state is None
    assert trained.evaluation.status == "infeasible"
    assert trained.evaluation.reason is not None
    assert trained.evaluation.reason.startswith(bounded)
    assert "allowed ≤" in trained.evaluation.reason
    assert trained.evaluation.cost.steps == 0
    assert "accuracy" not in trained.evaluation.values
    assert evaluator.evaluate(small).status == "complete"  # the bound itself is allowed


def test_a_constraint_need_not_be_an_objective() -> None:
    evaluator = tiny_evaluator(
        objectives=("accuracy", "trainable_parameters"), constraints={"peak_memory": "1 KiB"}
    )
    evaluation = evaluator.evaluate(lora(evaluator.backbone))
    assert evaluation.status == "infeasible"
    assert "peak_memory" in evaluation.values


@pytest.mark.parametrize("step", [1, 4])
def test_ctrl_c_while_training_is_a_keyboard_interrupt(step: int) -> None:
    evaluator = tiny_evaluator()
    backbone = evaluator.backbone
    before = fingerprint(backbone.model)
    handler = signal.getsignal(signal.SIGINT)
    configuration = lora(backbone)
    with (
        in_training_forward(evaluator, step, lambda: signal.raise_signal(signal.SIGINT)),
        pytest.raises(KeyboardInterrupt),
    ):
        evaluator.evaluate(configuration)
    assert signal.getsignal(signal.SIGINT) is handler
    assert backbone.attached is None
    assert fingerprint(backbone.model) == before
    assert evaluator.evaluate(configuration).curves == tiny_evaluator().evaluate(configuration).curves


def test_a_model_that_leaves_the_process_has_failed() -> None:
    """Lightning makes the same exception of Ctrl-C."""

    def act() -> None:
        sys.exit("bad licence")

    logging.getLogger("autopeft.evaluation.run").setLevel(logging.ERROR)
    evaluation, _ = failing(act)
    logging.getLogger("autopeft.evaluation.run").setLevel(logging.NOTSET)
    assert (evaluation.status, evaluation.reason) == ("failed", "SystemExit: bad licence")


def test_a_validation_that_is_not_finite_is_a_divergence() -> None:
    """The last step breaks the weights: a class is predicted of NaN too, and would be scored."""
    training = Training(epochs=1, batch_size=8, max_steps=1, device="cpu", precision="32-true")
    evaluator = tiny_evaluator(training=training)
    evaluation = evaluator.evaluate(lora(evaluator.backbone, learning_rate=1e37))
    assert evaluation.status == "failed"
    assert evaluation.reason is not None
    assert re.fullmatch(r"diverged: validation_loss was (nan|inf) at step 1", evaluation.reason)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_was_not_finite_once_is_a_divergence(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = tiny_evaluator(training=Training(epochs=2, batch_size=8, device="cpu", precision="32-true"))
    recorded = LearningCurve.on_validation_end

    def spoilt(curve: LearningCurve, trainer: Any, module: Any) -> None:
        recorded(curve, trainer, module)
        if len({step for _, step, _ in curve.points}) == 1:
            name, step, _ = curve.points[-1]
            curve.points[-1] = (name, step, value)

    monkeypatch.setattr(LearningCurve, "on_validation_end", spoilt)
    evaluation = evaluator.evaluate(lora(evaluator.backbone))
    assert evaluation.status == "failed"
    assert f"was {value} at step" in str(evaluation.reason)


def test_a_test_that_fails_leaves_no_trainer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = tiny_evaluator()
    trained = evaluator.train(lora(evaluator.backbone))
    assert trained.state is not None
    dismantled: list[Any] = []
    monkeypatch.setattr("autopeft.evaluation.context.dismantle", dismantled.append)

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such file")

    monkeypatch.setattr(type(evaluator.data), "test_dataloader", broken)
    with pytest.raises(RuntimeError, match="no such file"):
        evaluator.test(trained.evaluation.configuration, trained.state)
    assert len(dismantled) == 1


def test_a_configuration_the_backbone_cannot_carry_is_an_error() -> None:
    evaluator = tiny_evaluator()
    elsewhere = everywhere(learner(num_hidden_layers=3), "lora")
    with pytest.raises(ValueError, match="no block 2"):
        evaluator.evaluate(elsewhere)


def test_the_test_split_is_read_by_test_alone() -> None:
    evaluator = tiny_evaluator(training=Training(epochs=3, batch_size=8, device="cpu", precision="32-true"))
    configuration = lora(evaluator.backbone)
    trained = evaluator.train(configuration)
    assert trained.state is not None
    assert "test" not in evaluator.task.__dict__["_read_splits"]
    before = fingerprint(evaluator.backbone.model)
    metrics = evaluator.test(configuration, trained.state)
    assert fingerprint(evaluator.backbone.model) == before
    assert metrics.keys() == {"accuracy", "f1", "matthews"}
    assert metrics["accuracy"] == pytest.approx(held_out_accuracy(evaluator, configuration, trained.state))


def held_out_accuracy(evaluator: Evaluator, configuration: Configuration, state: Any) -> float:
    """Count the right answers on the test split, without Lightning."""
    from autopeft.methods import attach

    right = total = 0
    with attach(evaluator.backbone, configuration) as attachment, torch.no_grad():
        attachment.load_state_dict(state)
        evaluator.backbone.model.eval()
        for batch in evaluator.data.test_dataloader():
            labels = batch.pop("labels")
            right += int((evaluator.backbone.model(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
    assert total == 30
    return right / total


def test_defaults_are_those_of_a_search() -> None:
    evaluator = tiny_evaluator()
    assert evaluator.monitor.name == "accuracy"
    assert evaluator.training is TRAINING
    assert evaluator.needed == {*OBJECTIVES}


def test_steps_after_the_last_validation_are_judged_too() -> None:
    training = Training(epochs=3, batch_size=8, max_steps=9, device="cpu", precision="32-true")
    evaluator = tiny_evaluator(training=training)
    assert evaluator.steps_per_epoch == 6
    curve = evaluator.evaluate(Configuration(learning_rate=1e-2)).curves
    assert [point.step for point in curve if point.metric == "accuracy"] == [6, 9]


def test_a_seed_shuffles_too() -> None:
    data = tiny_evaluator().data

    def first(seed: int | None) -> str:
        return str(next(iter(data.train_dataloader(seed)))["input_ids"].tolist())

    assert first(None) == first(0) != first(5)
