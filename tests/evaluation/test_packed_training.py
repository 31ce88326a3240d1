"""Packed trials: what leaves a pack, what fails, what it costs, and what fits into memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.callbacks import LearningCurve
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.available import available_bytes
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.evaluation.packing import trainer
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.methods import attach
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoints, TrainingState
from tests.evaluation.test_evaluator import in_training_forward
from tests.learnable import tiny_evaluator
from tests.packed import (
    LORAS,
    TRAINING,
    WITHOUT_DROPOUT,
    assert_alike,
    compare,
    lora,
    minilm_evaluator,
    of,
    packing_evaluator,
)
from tests.tiny_models import fingerprint, tiny_backbone

pytestmark = pytest.mark.slow  # `test_packed_executor` tries the executor in `make test`


def test_trainings_with_callbacks_are_alone() -> None:
    evaluator = packing_evaluator(training=replace(TRAINING, callbacks=[LearningCurve]))
    assert not PackedTrainer(evaluator).can_pack(LORAS[0])
    assert PackedTrainer(packing_evaluator()).can_pack(LORAS[0])


def test_the_models_own_dropout_is_left_out_in_packs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextClassification, "trains_with_dropout", False)
    backbone = tiny_backbone("bert", new_head=True, hidden_dropout_prob=0.3)
    loras = (lora("0-1.query", 3), lora("1.value", 2))
    packed = compare(tiny_evaluator(backbone, training=TRAINING), loras)  # alike, as there are no masks
    assert {trained.evaluation.status for trained in packed} == {"complete"}
    assert backbone.model.config.hidden_dropout_prob == 0.3


def test_a_trial_that_diverges_leaves_and_the_others_go_on() -> None:
    evaluator = packing_evaluator()
    wild = lora("1-3.query 1-3.value", 3, 1e30)
    packed = compare(evaluator, (LORAS[0], wild, LORAS[2], LORAS[4]))
    assert [trained.evaluation.status for trained in packed] == ["complete", "failed", "complete", "complete"]
    assert packed[1].state is None
    assert str(packed[1].evaluation.reason).startswith("diverged: the training loss was")
    assert "accuracy" not in packed[1].evaluation.values


def test_all_trials_may_diverge() -> None:
    packed = compare(packing_evaluator(), (lora("1.query", 2, 1e30), lora("2.query", 2, 1e32)))
    assert {trained.evaluation.status for trained in packed} == {"failed"}


@pytest.mark.parametrize("training", [{"epochs": 3}, {"epochs": 6, "patience": 2}], ids=("whole", "early"))
def test_what_pauses_in_a_pack_resumes_alone_as_if_it_had_been_alone(
    training: dict[str, Any], tmp_path: Path
) -> None:
    settings = Training(batch_size=8, device="cpu", precision="32-true", **training)
    evaluator = packing_evaluator(training=settings, rungs=(0.4,))
    store = TrainingCheckpoints(tmp_path)
    packed = PackedTrainer(evaluator).train(LORAS, 5, rung=0)
    assert evaluator.backbone.attached is None
    for number, (configuration, trained) in enumerate(zip(LORAS, packed, strict=True)):
        alone = evaluator.train(configuration, 5, rung=0)
        assert_alike(trained, alone)
        if alone.evaluation.status == "complete":  # it has stopped early
            assert "patience" in training
            continue
        assert trained.evaluation.fidelity == pytest.approx(0.4, abs=0.05)
        assert trained.paused is not None
        assert alone.paused is not None
        assert_same_state(trained.paused.state, alone.paused.state)
        store.save(number, trained.paused)
        whole = evaluator.train(configuration, 5, paused=store.load(number))
        assert_alike(whole, evaluator.train(configuration, 5), tolerance=5e-5)
        assert whole.evaluation.cost.cpu_seconds > trained.evaluation.cost.cpu_seconds > 0


def assert_same_state(found: TrainingState, expected: TrainingState) -> None:
    assert found.step == expected.step
    for name in ("weights", "best_weights", "optimizer"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert found.generators.keys() == expected.generators.keys()
    assert found.best == pytest.approx(expected.best)
    assert found.best_metrics == pytest.approx(dict(expected.best_metrics), abs=1e-5)
    assert found.early_stopping == expected.early_stopping


def test_what_fails_before_a_rung_does_not_pause_there() -> None:
    evaluator = packing_evaluator(rungs=(0.5,))
    wild = lora("1-3.query 1-3.value", 3, 1e30)
    packed = PackedTrainer(evaluator).train((LORAS[0], wild), rung=0)
    assert [trained.evaluation.status for trained in packed] == ["paused", "failed"]
    assert packed[1].paused is None
    assert packed[1].evaluation.fidelity < 0.5
    assert_alike(packed[1], evaluator.train(wild, rung=0))


def test_an_infeasible_trial_is_not_trained() -> None:
    evaluator = packing_evaluator(constraints={"trainable_parameters": 300})
    packed = compare(evaluator, (lora("3.query", 1), LORAS[0], lora("3.value", 1)))
    assert [trained.evaluation.status for trained in packed] == ["complete", "infeasible", "complete"]


def test_latency_is_measured_for_each_trial() -> None:
    names = ("accuracy", "trainable_parameters", "inference_latency", "training_seconds")
    for trained in compare(packing_evaluator(objectives=names), LORAS[:2]):
        assert trained.evaluation.values["inference_latency"] > 0


def test_what_lies_below_the_cut_has_no_dropout_as_in_a_training_alone() -> None:
    evaluator = packing_evaluator()
    backbone = evaluator.backbone
    for part in (backbone.model.get_submodule("bert.embeddings"), *backbone.blocks[:2]):
        for module in part.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
    compare(evaluator, (lora("2-3.query", 2), lora("3.query 3.value", 4, 3e-3), of({})))


def interrupted(act: Callable[[], None], expected: type[BaseException]) -> None:
    evaluator = packing_evaluator()
    before = fingerprint(evaluator.backbone.model)
    with in_training_forward(evaluator, 3, act), pytest.raises(expected):
        PackedTrainer(evaluator).train(LORAS)
    assert fingerprint(evaluator.backbone.model) == before
    assert evaluator.backbone.attached is None
    assert not evaluator.backbone.model.training
    compare(evaluator, LORAS[:2])


def test_ctrl_c_leaves_the_backbone_as_it_was() -> None:
    def act() -> None:
        raise KeyboardInterrupt

    interrupted(act, KeyboardInterrupt)


def test_a_pack_that_fails_is_halved_and_no_trial_fails_for_it(caplog: pytest.LogCaptureFixture) -> None:
    def act() -> None:
        raise torch.OutOfMemoryError("no room")

    evaluator = packing_evaluator()
    before = fingerprint(evaluator.backbone.model)
    with in_training_forward(evaluator, 3, act):
        packed = PackedTrainer(evaluator).train(LORAS)
    assert "A pack of 5 failed and is halved (OutOfMemoryError: no room)" in caplog.text
    assert fingerprint(evaluator.backbone.model) == before
    for configuration, trained in zip(LORAS, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))


def test_a_failure_that_stays_is_the_trials_own_outcome() -> None:
    evaluator = packing_evaluator()

    def act(_module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and type(output) is torch.Tensor and not output.is_meta:
            raise RuntimeError("the wire came loose")

    handle = evaluator.backbone.model.get_submodule("classifier").register_forward_hook(act)
    packed = PackedTrainer(evaluator).train(LORAS[:2])
    handle.remove()
    assert [trained.evaluation.status for trained in packed] == ["failed", "failed"]
    assert packed[0].evaluation.reason == "RuntimeError: the wire came loose"


def test_a_model_that_mixes_rows_is_packed_no_more(caplog: pytest.LogCaptureFixture) -> None:
    evaluator = packing_evaluator()
    block = evaluator.backbone.blocks[3]
    handle = block.register_forward_hook(lambda _module, _inputs, output: output + output.mean(0))
    before = fingerprint(evaluator.backbone.model)
    packed_trainer = PackedTrainer(evaluator)
    packed = packed_trainer.train((LORAS[0], LORAS[2]))
    assert "a trial has other logits in the pack than alone" in caplog.text
    assert fingerprint(evaluator.backbone.model) == before
    assert not packed_trainer.can_pack(LORAS[0])
    for configuration, trained in zip((LORAS[0], LORAS[2]), packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))
    handle.remove()


def test_lora_where_deberta_projects_positions_for_all_rows_is_trained_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"share_att_key": True, "num_hidden_layers": 4, **WITHOUT_DROPOUT["deberta-v2"]}
    backbone = tiny_backbone("deberta-v2", new_head=True, **options)
    evaluator = tiny_evaluator(backbone, objectives=("accuracy", "trainable_parameters"))
    before = fingerprint(backbone.model)
    configurations = (lora("2.query"), lora("3.query"))
    packed = PackedTrainer(evaluator).train(configurations)
    assert "rows where the pack has" in caplog.text
    assert fingerprint(backbone.model) == before
    for configuration, trained in zip(configurations, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))


def test_a_configuration_the_backbone_cannot_carry_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block 7"):
        PackedTrainer(packing_evaluator()).train((LORAS[0], lora("7.query")))
    assert PackedTrainer(packing_evaluator()).train(()) == []


@pytest.mark.slow
def test_dropout_trains_too_and_is_off_in_validation() -> None:
    backbone = tiny_backbone("bert", new_head=True, num_hidden_layers=4)
    evaluator = tiny_evaluator(
        backbone, rows=96, training=Training(epochs=6, batch_size=8, device="cpu", precision="32-true")
    )
    configurations = (
        lora("0-3.query 0-3.value 0-3.ffn_up", 8, dropout=0.2),
        lora("0-3.query 0-3.value 0-3.ffn_up", 8),
        lora("2-3.query 2-3.ffn_down", 4, dropout=0.1),
    )
    packed, again = (PackedTrainer(evaluator).train(configurations) for _ in range(2))
    for first, second in zip(packed, again, strict=True):
        assert first.evaluation.curves == second.evaluation.curves
    assert packed[0].evaluation.values["accuracy"] > 0.6
    for trained in packed:
        assert trained.state is not None
        with attach(backbone, trained.evaluation.configuration) as attachment:
            attachment.load_state_dict(trained.state)
            accuracy = _validation_accuracy(evaluator)
        assert accuracy == pytest.approx(trained.evaluation.values["accuracy"])


@torch.no_grad()
def _validation_accuracy(evaluator: Evaluator) -> float:
    evaluator.backbone.model.eval()
    right = total = 0
    for batch in evaluator.data.val_dataloader():
        labels = batch.pop("labels")
        right += int((evaluator.backbone.model(**batch).logits.argmax(-1) == labels).sum())
        total += len(labels)
    return right / total


def test_packing_leaves_the_random_generator_alone() -> None:
    state = torch.get_rng_state()
    PackedTrainer(packing_evaluator()).train(LORAS[:2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bound", ["free memory", "constraint"])
def test_a_memory_bound_splits_a_pack(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = packing_evaluator()
    frozen = sum(tensor.nbytes for tensor in evaluator.backbone.model.state_dict().values())
    together = sum(evaluator.costs(configuration)["peak_memory"] - frozen for configuration in LORAS)
    room = int(0.6 * together)
    if bound == "constraint":
        evaluator = packing_evaluator(constraints={"peak_memory": frozen + room})
    else:
        monkeypatch.setattr(trainer, "available_bytes", lambda device: room)
    rows: list[int] = []
    handle = evaluator.backbone.model.register_forward_hook(
        lambda module, _inputs, output: rows.append(len(output.logits)) if module.training else None
    )
    packed = PackedTrainer(evaluator).train(LORAS)
    handle.remove()
    assert 8 < max(rows) < 8 * len(LORAS)
    for configuration, trained in zip(LORAS, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))


def test_free_memory_is_what_the_machine_has_at_most() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes(torch.device("cpu")) <= total


@pytest.mark.slow
def test_a_pack_keeps_to_its_memory_bound(
    minilm_folder: Path, questions_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = minilm_evaluator(minilm_folder, questions_csv)
    model = evaluator.backbone.model
    peaks: list[int] = []
    train = PackedTrainer._train

    def counted(packed_trainer: PackedTrainer, *arguments: Any) -> Any:
        counter = StorageCounter()
        counter.exclude((*model.parameters(), *model.buffers()))
        with counter:
            trained = train(packed_trainer, *arguments)
        peaks.append(counter.peak_bytes)
        return trained

    monkeypatch.setattr(PackedTrainer, "_train", counted)
    configurations = [lora("0-5.query 0-5.value", 8), lora("3-5.query", 4), lora("3-5.ffn_up", 4), of({})]
    PackedTrainer(evaluator).train(configurations)
    room = int(0.7 * peaks.pop())
    monkeypatch.setattr(trainer, "available_bytes", lambda device: room)
    PackedTrainer(evaluator).train(configurations)
    assert peaks
    assert max(peaks) <= room


def test_costs_add_up_to_what_was_spent() -> None:
    evaluator = packing_evaluator(rows=240)
    PackedTrainer(evaluator).train(LORAS[:2])
    started = time.process_time()
    packed = PackedTrainer(evaluator).train(LORAS)
    spent = time.process_time() - started
    assert sum(trained.evaluation.cost.cpu_seconds for trained in packed) == pytest.approx(spent, rel=0.1)
    assert {trained.evaluation.cost.steps for trained in packed} == {evaluator.plan.total_steps}
    assert all(trained.evaluation.values["training_seconds"] > 0 for trained in packed)
