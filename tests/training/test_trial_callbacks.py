"""Callbacks that a user passes to `Training`: they reach every trial, anew, and go on after a pause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autopeft.callbacks import IST, LISA, ARDLoRA, ElaLoRA, IncreLoRA, SoRA
from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import attach
from autopeft.search_spaces import PerLayer
from autopeft.training.settings import Training
from autopeft.training.trainer import build_trainer, quiet_lightning
from autopeft.training.trial_callbacks import new_callbacks
from tests.learnable import TRAINING as ONE_EPOCH
from tests.learnable import tiny_evaluator, tiny_search
from tests.training.test_training_checkpoint import TRAINING, in_parts, lora, make_evaluator, same

RUNGS = (0.4,)


class Count(Callback):
    """Counts batches, over pauses too."""

    counts: list[int]

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.batches = 0
        self.steps: list[int] = []

    @property
    def state_key(self) -> str:
        """Several of them are told apart by it."""
        return f"Count{self.every}"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.batches += 1
        self.steps.append(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Count.counts.append(self.batches)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "nested": {"steps": self.steps, "pair": (1, torch.ones(2))}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]
        self.steps = state_dict["nested"]["steps"]
        assert isinstance(state_dict["nested"]["pair"], tuple)
        assert torch.equal(state_dict["nested"]["pair"][1], torch.ones(2))


@pytest.fixture(autouse=True)
def no_counts() -> None:
    Count.counts = []


@pytest.mark.parametrize("given", ["IST", IST(), [3], {"IST": 1}])
def test_what_is_no_list_of_callbacks_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="callbacks is a list"):
        Training(callbacks=given)


def test_a_function_has_to_make_a_callback() -> None:
    training = Training(callbacks=[lambda: 3])  # type: ignore[list-item, return-value]
    with pytest.raises(ValueError, match=r"returned 3, expected a lightning\.pytorch\.Callback"):
        new_callbacks(training.callbacks)


def test_each_trial_has_callbacks_of_its_own() -> None:
    given = Count()
    evaluator = tiny_evaluator(training=replace(ONE_EPOCH, callbacks=[given, partial(Count, 2)]))
    for _ in range(2):
        assert evaluator.evaluate(lora(evaluator)).status == "complete"
    assert Count.counts == [6] * 4
    assert given.batches == 0


def test_class_and_settings_of_callbacks_are_part_of_the_identity() -> None:
    identities = [
        Training(callbacks=callbacks).identity()
        for callbacks in (
            [],
            [Count()],
            [Count(2)],
            [Count(), SoRA(0.1)],
            [SoRA(0.1), Count()],
            [partial(SoRA, 0.2)],
            [IST(every_n_steps=3)],
            [IST(every_n_steps=4)],
            [LISA(2, every_n_steps=1, seed=0)],
            [LISA(2, every_n_steps=1, seed=1)],
            [ElaLoRA(9, every_n_steps=1, moves=1)],
            [ElaLoRA(9, every_n_steps=1, moves=1, betas=(0.5, 0.5))],
        )
    ]
    assert "callbacks" not in identities[0]
    assert "Count(batches=0, every=2" in identities[2]["callbacks"]
    assert len({str(identity) for identity in identities}) == len(identities)
    assert Training(callbacks=[Count()]).identity() == Training(callbacks=[Count]).identity()


@pytest.mark.slow
def test_a_search_with_layer_sampling_and_a_callback_of_ones_own(tmp_path: Path) -> None:
    training = replace(ONE_EPOCH, callbacks=[IST(every_n_steps=2, trials=2), Count])
    space = PerLayer(methods=("lora", "ia3"), sizes={"rank": (1, 8)})
    search = tiny_search(tmp_path, space=space, training=training)
    front = search.run(trials=6, progress=False)
    # IST has nothing to act on in the head alone.
    assert any(not record.evaluation.configuration.adapters for record in front.records)
    assert [record.evaluation.status for record in front.records] == ["complete"] * 6
    assert Count.counts == [1, *[6] * 6]  # the first is the step before the search
    other = tiny_search(tmp_path, space=space, training=ONE_EPOCH)
    with pytest.raises(ValueError, match="callbacks"):
        other.run(trials=7, progress=False)


def test_layer_sampling_changes_what_is_learned() -> None:
    plain = tiny_evaluator()
    sampled = tiny_evaluator(training=replace(ONE_EPOCH, callbacks=[IST(every_n_steps=2, trials=2)]))
    first, second = (evaluator.train(lora(evaluator)).state for evaluator in (plain, sampled))
    assert first is not None
    assert second is not None
    assert not all(torch.equal(tensor, second[name]) for name, tensor in first.items())


CALLBACKS: Mapping[str, Callable[[int], Callback]] = {
    "IST": lambda sites: IST(every_n_steps=2, trials=2),
    "LISA": lambda sites: LISA(1, every_n_steps=3),
    "SoRA": lambda sites: SoRA(0.02),
    "ARDLoRA": lambda sites: ARDLoRA(0.02, total_variation=0.01, granularity="module"),
    "IncreLoRA": lambda sites: IncreLoRA(2 * sites, every_n_steps=2, modules_per_growth=sites // 4),
    "ElaLoRA": lambda sites: ElaLoRA(2 * sites, every_n_steps=2, moves=3),
    "Count": lambda sites: Count(),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.slow
def test_a_paused_training_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    sites = len(lora(make_evaluator(RUNGS)))
    training = replace(TRAINING, callbacks=[CALLBACKS[name](sites)])
    whole = make_evaluator(RUNGS, training)
    uncut = whole.train(lora(whole))
    assert uncut.evaluation.status == "complete", uncut.evaluation.reason
    same(uncut, in_parts(make_evaluator(RUNGS, training), tmp_path))
    if name == "Count":
        assert Count.counts[0] == Count.counts[-1] == 18


def test_callbacks_see_the_steps_of_the_whole_training() -> None:
    seen: list[tuple[int, float]] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            seen.append((trainer.global_step, trainer.estimated_stepping_batches))

    evaluator = make_evaluator((0.5,), replace(TRAINING, callbacks=[Note]))
    paused = evaluator.train(lora(evaluator), rung=0).paused
    evaluator.train(lora(evaluator), paused=paused)
    assert seen == [(step, 18) for step in range(1, 19)]


class Unkept(Callback):
    """Has a state that no file can keep."""

    def state_dict(self) -> dict[str, Any]:
        return {"model": object()}


def test_a_state_that_cannot_be_kept_is_refused_where_trials_pause() -> None:
    training = replace(TRAINING, callbacks=[Unkept()])
    with pytest.raises(ValueError, match=r"Unkept cannot pause at a rung: its state holds <object"):
        make_evaluator((0.5,), training)
    evaluator = make_evaluator((), training)
    assert evaluator.train(lora(evaluator)).evaluation.status == "complete"


@pytest.mark.parametrize("name", ["SoRA", "ARDLoRA", "ElaLoRA"])
def test_the_tensors_that_are_kept_score_what_was_validated(name: str) -> None:
    evaluator = make_evaluator(())
    configuration = lora(evaluator, 3e-2)
    callback = CALLBACKS[name](len(configuration))
    evaluator = make_evaluator((), replace(TRAINING, callbacks=[callback]))
    trained = evaluator.train(configuration)
    assert trained.state is not None
    found = validated(evaluator, configuration, trained.state)
    for metric in ("accuracy", "validation_loss"):
        assert found[metric] == pytest.approx(trained.evaluation.values[metric], rel=1e-4)


def validated(
    evaluator: Evaluator, configuration: Configuration, state: Mapping[str, Tensor]
) -> Mapping[str, float]:
    with attach(evaluator.backbone, configuration, evaluator.seed) as attachment, quiet_lightning():
        attachment.load_state_dict(state)
        trainer = build_trainer(evaluator.training, [], monitor=evaluator.monitor)
        module = evaluator.module(configuration).eval()
        (metrics,) = trainer.validate(module, evaluator.data.val_dataloader(), verbose=False)
    return metrics
