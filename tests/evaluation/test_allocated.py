"""Trainings that allocate ranks: what is left of them computes the same with fewer parameters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.rank_allocation import RANK_ALLOCATIONS
from autopeft.evaluation.derived import allocated, derive_again
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.methods import attach, count_parameters
from autopeft.training import rank_allocation
from autopeft.training.training_checkpoint import TrainingCheckpoints
from tests.slow_cases import slow_cases
from tests.tiny_models import everywhere
from tests.training.test_training_checkpoint import make_evaluator, same

RANK = 4


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return make_evaluator(())


def configuration_of(evaluator: Evaluator, allocation: str) -> Configuration:
    adapters = everywhere(evaluator.backbone, RANK_ALLOCATIONS[allocation].method, RANK).adapters
    return Configuration(adapters, learning_rate=1e-2, allocation=allocation)


def ranks(configuration: Configuration) -> int:
    return sum(adapter.size or 0 for _, adapter in configuration)


def logits(evaluator: Evaluator, configuration: Configuration, state: object) -> torch.Tensor:
    with attach(evaluator.backbone, configuration) as attachment, torch.no_grad():
        attachment.load_state_dict(state)  # type: ignore[arg-type]
        found: torch.Tensor = evaluator.backbone.model.eval()(**evaluator.model_call()).logits
        return found


@pytest.mark.parametrize(
    "allocation", ["increlora", *slow_cases(*(name for name in RANK_ALLOCATIONS if name != "increlora"))]
)
def test_what_is_left_computes_the_same(
    evaluator: Evaluator, allocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rank_allocation, "_PENALTY", 0.1
    )  # of so small a model the gates have large gradients
    asked = configuration_of(evaluator, allocation)
    trained = evaluator.train(asked)
    assert trained.evaluation.status == "complete", trained.evaluation.reason
    assert trained.state is not None
    whole, *points = allocated(evaluator, trained)
    if allocation == "ist":
        assert not points
        plain = evaluator.train(asked.replace(allocation=None))
        assert plain.evaluation.values["validation_loss"] != trained.evaluation.values["validation_loss"]
        return
    (point,) = points
    left, values = point.evaluation.configuration, point.evaluation.values
    assert point.state is not None
    assert left.allocation is None
    kept = RANK_ALLOCATIONS[allocation].kept
    if kept < 1:
        assert 0 < ranks(left) <= kept * ranks(asked)
        assert len({adapter.size for _, adapter in left}) > 1, "ranks differ"
    else:
        assert ranks(left) < ranks(asked)
    expected = logits(evaluator, asked, trained.state)
    torch.testing.assert_close(logits(evaluator, left, point.state), expected, rtol=1e-4, atol=1e-5)
    assert values["trainable_parameters"] == count_parameters(evaluator.backbone, left)
    assert whole.evaluation.values["trainable_parameters"] == count_parameters(evaluator.backbone, asked)
    assert values["accuracy"] == whole.evaluation.values["accuracy"]
    assert values["peak_memory"] == whole.evaluation.values["peak_memory"]
    assert whole.evaluation.values_at_end == values
    assert TrialRecord.from_dict(TrialRecord(number=1, evaluation=whole.evaluation).to_dict()).points[1:]


def test_another_training_is_cut_to_the_same_ranks(evaluator: Evaluator) -> None:
    asked = configuration_of(evaluator, "adalora")
    _, first = allocated(evaluator, evaluator.train(asked))
    left = first.evaluation.configuration
    _, again = derive_again(evaluator, evaluator.train(asked, 5), [left])
    assert again.evaluation.status == "complete"
    assert again.evaluation.configuration == left
    assert again.state is not None
    assert first.state is not None
    assert again.state.keys() == first.state.keys()


def test_adalora_goes_on_after_a_pause(tmp_path: Path) -> None:
    asked = configuration_of(make_evaluator(()), "adalora")
    whole = make_evaluator((0.4,)).train(asked)
    evaluator, store = make_evaluator((0.4,)), TrainingCheckpoints(tmp_path)
    paused = evaluator.train(asked, rung=0).paused
    assert paused is not None
    store.save(7, paused)
    same(whole, evaluator.train(asked, paused=store.load(7)))


def test_it_is_trained_alone(evaluator: Evaluator) -> None:
    trainer = PackedTrainer(evaluator)
    asked = configuration_of(evaluator, "sora")
    assert trainer.can_pack(asked.replace(allocation=None))
    assert not trainer.can_pack(asked)


def test_points_without_an_allocation_have_their_own_values(evaluator: Evaluator) -> None:
    plain = evaluator.evaluate(configuration_of(evaluator, "sora").replace(allocation=None))
    cut = replace(plain, values={**plain.values, "accuracy": 0.0})
    assert replace(plain, derived=(cut,)).values_at_end == plain.values
