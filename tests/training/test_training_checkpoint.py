"""A training that pauses and goes on is, bit for bit, the one that never paused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autopeft.core.configuration import Configuration
from autopeft.core.durable_files import save_tensors
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.largest_lora import LargestLora
from autopeft.evaluation.run import Trained
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoint, TrainingCheckpoints
from autopeft.training.validation_schedule import ValidationSchedule
from tests.learnable import OBJECTIVES, learnable_task
from tests.slow_cases import slow_cases
from tests.tiny_models import everywhere, tiny_backbone

TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true")
TIMES = ("training_seconds", "examples_per_second", "inference_latency")


def make_evaluator(
    rungs: tuple[float, ...],
    training: Training = TRAINING,
    architecture: str = "bert",
    cache: Path | None = None,
) -> Evaluator:
    task = learnable_task(rows=44)  # 6 steps an epoch, the last with fewer rows
    backbone = tiny_backbone(architecture, new_head=True)
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    objectives = resolve_objectives(OBJECTIVES, task.metrics)
    return Evaluator(backbone, task, training, objectives, rungs=rungs, cache=cache)


def lora(evaluator: Evaluator, learning_rate: float = 1e-2) -> Configuration:
    return Configuration(everywhere(evaluator.backbone, "lora", 4).adapters, learning_rate=learning_rate)


def in_parts(evaluator: Evaluator, folder: Path) -> Trained:
    """Train from rung to rung, through files, with other random numbers drawn in between."""
    store = TrainingCheckpoints(folder)
    configuration = lora(evaluator)
    for rung in range(len(evaluator.plan.rungs) - 1):
        trained = evaluator.train(configuration, rung=rung, paused=store.load(7))
        assert trained.evaluation.status == "paused"
        assert trained.state is None
        assert trained.paused is not None
        assert trained.paused.step == trained.evaluation.cost.steps == evaluator.plan.rungs[rung]
        store.save(7, trained.paused)
        torch.rand(11)
        evaluator.train(lora(evaluator, 3e-3), 5)
    return evaluator.train(configuration, paused=store.load(7))


def same(first: Trained, second: Trained) -> None:
    assert first.state is not None
    assert second.state is not None
    assert first.state.keys() == second.state.keys()
    assert all(torch.equal(tensor, second.state[name]) for name, tensor in first.state.items())
    evaluation, other = (
        replace(
            trained.evaluation,
            values={name: v for name, v in trained.evaluation.values.items() if name not in TIMES},
            cost=replace(trained.evaluation.cost, wall_seconds=0.0, cpu_seconds=0.0),
        )
        for trained in (first, second)
    )
    assert evaluation == other


@pytest.mark.parametrize("rungs", [(1 / 3,), (1 / 9, 0.4, 0.7)], ids=("epoch", "within epochs"))
@pytest.mark.parametrize("architecture", ["bert", *slow_cases("llama")])
def test_a_resumed_training_equals_an_uninterrupted_one(
    rungs: tuple[float, ...], architecture: str, tmp_path: Path
) -> None:
    whole = make_evaluator(rungs, architecture=architecture)
    uncut = whole.train(lora(whole))
    assert uncut.evaluation.cost.steps == 18
    same(uncut, in_parts(make_evaluator(rungs, architecture=architecture), tmp_path))


def test_early_stopping_goes_on_where_it_was(tmp_path: Path) -> None:
    training = replace(TRAINING, epochs=9, patience=2)
    rungs = (1 / 9, 2 / 9)
    whole = make_evaluator(rungs, training)
    uncut = whole.train(lora(whole))
    assert 12 < uncut.evaluation.cost.steps < 54, "early stopping must have ended it after the last rung"
    same(uncut, in_parts(make_evaluator(rungs, training), tmp_path))


def test_a_state_already_at_the_rung_is_not_trained_again() -> None:
    evaluator = make_evaluator((0.5,))
    first = evaluator.train(lora(evaluator), rung=0)
    again = evaluator.train(lora(evaluator), rung=0, paused=first.paused)
    assert again.evaluation is first.evaluation
    assert again.paused is first.paused


def test_a_paused_evaluation_says_how_far_it_came() -> None:
    evaluator = make_evaluator((1 / 3,))
    evaluation = evaluator.train(lora(evaluator), rung=0).evaluation
    assert evaluation.fidelity == pytest.approx(1 / 3)
    assert evaluation.reason == f"accuracy {evaluation.values['accuracy']:.4f} after 6 steps"
    assert {point.step for point in evaluation.curves} == {6}
    assert set(OBJECTIVES) <= evaluation.values.keys()


def test_a_failure_after_a_pause_keeps_what_was_known() -> None:
    evaluator = make_evaluator((1 / 3,))
    paused = evaluator.train(lora(evaluator), rung=0).paused
    assert paused is not None
    broken = {name: tensor.clone() for name, tensor in paused.state.weights.items()}
    next(iter(broken.values())).fill_(float("nan"))
    failed = evaluator.train(
        lora(evaluator), paused=replace(paused, state=replace(paused.state, weights=broken))
    )
    assert failed.evaluation.status == "failed"
    assert (failed.state, failed.paused) == (None, None)
    assert "diverged" in str(failed.evaluation.reason)
    assert failed.evaluation.values["accuracy"] == paused.evaluation.values["accuracy"]
    assert failed.evaluation.cost.steps >= paused.step


@pytest.mark.parametrize("kept", ["{}", "[]", "[" * 2000, '{"state": {}, "evaluation": {}}'])
@pytest.mark.parametrize("load", [TrainingCheckpoint.load, LargestLora.load])
def test_a_whole_file_with_anything_else_in_it_counts_as_missing(
    load: Callable[[Path], object], kept: str, tmp_path: Path
) -> None:
    path = tmp_path / "kept.safetensors"
    save_tensors(path, {"weights/a": torch.zeros(1)}, {"autopeft": kept})
    assert load(path) is None
    assert not path.exists()


def test_a_state_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    evaluator = make_evaluator((1 / 3,))
    paused = evaluator.train(lora(evaluator), rung=0).paused
    assert paused is not None
    store = TrainingCheckpoints(tmp_path / "paused")
    assert store.load(3) is None
    store.save(3, paused)
    (path,) = (tmp_path / "paused").iterdir()
    assert "generators/cpu" in load_file(path)
    loaded = store.load(3)
    assert loaded is not None
    assert loaded.evaluation == paused.evaluation
    for group in ("weights", "best_weights", "optimizer", "generators"):
        kept, found = getattr(paused.state, group), getattr(loaded.state, group)
        assert kept.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in kept.items())
    store.drop(3)
    store.drop(3)
    assert TrainingCheckpoint.load(path) is None


@pytest.mark.parametrize(
    ("training", "shares", "stops", "rungs"),
    [
        (Training(epochs=3), (), (10, 20, 30), (30,)),
        (Training(epochs=3, validate_every=2), (), (20, 30), (30,)),
        (Training(epochs=3, max_steps=25), (), (10, 20, 25), (25,)),
        (Training(epochs=3), (1 / 9, 1 / 3), (3, 10, 20, 30), (3, 10, 30)),
    ],
)
def test_a_plan_stops_at_epochs_rungs_and_the_end(
    training: Training, shares: tuple[float, ...], stops: tuple[int, ...], rungs: tuple[int, ...]
) -> None:
    plan = ValidationSchedule.of(training, 10, shares)
    assert (plan.stops, plan.rungs) == (stops, rungs)
    assert plan.pieces(0, plan.total_steps) == len(stops)
    assert plan.next_stop(stops[0]) == stops[1]


@pytest.mark.parametrize("shares", [(0.001,), (0.3, 0.31), (0.999,)])
def test_rungs_that_are_no_steps_of_their_own_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"of 30 optimizer steps are the steps .*expected increasing"):
        ValidationSchedule.of(Training(epochs=3), 10, shares)


def test_planned_batches_are_the_epochs_batches_in_order() -> None:
    evaluator = make_evaluator((0.25,))
    loader = evaluator.data.train_dataloader(0)
    expected = [batch["input_ids"] for _ in range(3) for batch in loader]
    for step in (0, 5, 13):
        batches = evaluator.batches(0, step)
        pieces = evaluator.plan.pieces(step, evaluator.plan.total_steps)
        found = [batch["input_ids"] for _ in range(pieces) for batch in batches if isinstance(batch, dict)]
        assert len(found) == len(expected) - step
        assert all(torch.equal(ids, other) for ids, other in zip(found, expected[step:], strict=True))
