"""Packed trials: who leaves a pack, what fails, what it costs, and what is worth packing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.evaluation.packing.loop import PackedTraining, shares
from autopeft.evaluation.packing.trainer import PackedTrainer, PackingError, packing_gain, worthwhile_packs
from autopeft.methods import attach
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoints, TrainingState
from tests.evaluation.test_evaluator import in_training_forward
from tests.learnable import tiny_evaluator
from tests.packed import (
    LORAS,
    MIXED,
    WITHOUT_DROPOUT,
    assert_alike,
    compare,
    lora,
    minilm_evaluator,
    of,
    packing_backbone,
    packing_evaluator,
)
from tests.tiny_models import fingerprint, tiny_backbone


def test_a_candidate_that_diverges_leaves_and_the_others_go_on() -> None:
    evaluator = packing_evaluator()
    wild = lora("1-3.query 1-3.value", 3, 1e30)
    packed = compare(evaluator, (LORAS[0], wild, LORAS[2], MIXED[2]))
    assert [one.evaluation.status for one in packed] == ["complete", "failed", "complete", "complete"]
    assert packed[1].state is None
    assert str(packed[1].evaluation.reason).startswith("diverged: the training loss was")
    assert "accuracy" not in packed[1].evaluation.values


def test_all_candidates_may_diverge() -> None:
    packed = compare(packing_evaluator(), (lora("1.query", 2, 1e30), lora("2.query", 2, 1e32)))
    assert {one.evaluation.status for one in packed} == {"failed"}


@pytest.mark.parametrize("training", [{"epochs": 3}, {"epochs": 6, "patience": 2}], ids=("whole", "early"))
@pytest.mark.parametrize("methods", [LORAS, MIXED], ids=("lora", "mixed"))
def test_who_pauses_in_a_pack_goes_on_alone_as_if_it_had_been_alone(
    training: dict[str, Any], methods: tuple[Configuration, ...], tmp_path: Path
) -> None:
    settings = Training(batch_size=8, device="cpu", precision="32-true", **training)
    evaluator = packing_evaluator(training=settings, rungs=(0.4,))
    store = TrainingCheckpoints(tmp_path)
    packed = PackedTrainer(evaluator).train(methods, 5, rung=0)
    assert evaluator.backbone.attached is None
    for number, (configuration, trained) in enumerate(zip(methods, packed, strict=True)):
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


def assert_same_state(one: TrainingState, other: TrainingState) -> None:
    assert one.step == other.step
    for name in ("weights", "best_weights", "optimizer"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-5)
    assert one.generators.keys() == other.generators.keys()
    assert one.best == pytest.approx(other.best)
    assert one.best_metrics == pytest.approx(dict(other.best_metrics), abs=1e-5)
    stopping = {key: other.early_stopping[key] for key in one.early_stopping}
    assert one.early_stopping == pytest.approx(stopping)
    assert bool(one.early_stopping) == bool(other.early_stopping)


def test_who_fails_before_a_rung_does_not_pause_there() -> None:
    evaluator = packing_evaluator(rungs=(0.5,))
    wild = lora("1-3.query 1-3.value", 3, 1e30)
    packed = PackedTrainer(evaluator).train((LORAS[0], wild), rung=0)
    assert [one.evaluation.status for one in packed] == ["paused", "failed"]
    assert packed[1].paused is None
    assert packed[1].evaluation.fidelity < 0.5
    assert_alike(packed[1], evaluator.train(wild, rung=0))


def test_an_infeasible_candidate_is_not_trained() -> None:
    evaluator = packing_evaluator(constraints={"trainable_parameters": 300})
    packed = compare(evaluator, (lora("3.query", 1), LORAS[0], lora("3.value", 1)))
    assert [one.evaluation.status for one in packed] == ["complete", "infeasible", "complete"]


def test_latency_is_measured_for_each_candidate() -> None:
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
        PackedTrainer(evaluator).train(MIXED)
    assert fingerprint(evaluator.backbone.model) == before
    assert evaluator.backbone.attached is None
    assert not evaluator.backbone.model.training
    compare(evaluator, LORAS[:2])


def test_ctrl_c_leaves_the_backbone_as_it_was() -> None:
    def act() -> None:
        raise KeyboardInterrupt

    interrupted(act, KeyboardInterrupt)


def test_a_pack_that_fails_is_halved_and_nobody_fails_for_it(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_failure_that_stays_is_the_candidates_own_outcome() -> None:
    evaluator = packing_evaluator()

    def act(_module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled() and type(output) is torch.Tensor and not output.is_meta:
            raise RuntimeError("the wire came loose")

    handle = evaluator.backbone.model.get_submodule("classifier").register_forward_hook(act)
    packed = PackedTrainer(evaluator).train(LORAS[:2])
    handle.remove()
    assert [one.evaluation.status for one in packed] == ["failed", "failed"]
    assert packed[0].evaluation.reason == "RuntimeError: the wire came loose"


def test_a_model_that_mixes_rows_is_refused() -> None:
    evaluator = packing_evaluator()
    block = evaluator.backbone.blocks[3]
    handle = block.register_forward_hook(lambda _module, _inputs, output: output + output.mean(0))
    before = fingerprint(evaluator.backbone.model)
    with pytest.raises(PackingError, match="gives other logits in a pack than alone"):
        PackedTrainer(evaluator).train((LORAS[0], MIXED[2]))
    assert fingerprint(evaluator.backbone.model) == before
    handle.remove()


def test_lora_where_deberta_projects_positions_for_all_rows_is_refused() -> None:
    options: dict[str, Any] = {"share_att_key": True, "num_hidden_layers": 4, **WITHOUT_DROPOUT["deberta-v2"]}
    backbone = tiny_backbone("deberta-v2", new_head=True, **options)
    evaluator = tiny_evaluator(backbone, objectives=("accuracy", "trainable_parameters"))
    before = fingerprint(backbone.model)
    with pytest.raises(PackingError, match="the model cannot be packed"):
        PackedTrainer(evaluator).train((lora("2.query"), lora("3.query")))
    assert fingerprint(backbone.model) == before


def test_a_configuration_the_backbone_cannot_carry_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block 7"):
        PackedTrainer(packing_evaluator()).train((LORAS[0], lora("7.query")))
    assert PackedTrainer(packing_evaluator()).train(()) == []


def test_dropout_trains_too_and_is_off_in_validation() -> None:
    backbone = tiny_backbone("bert", new_head=True, num_hidden_layers=4)
    evaluator = tiny_evaluator(
        backbone, rows=96, training=Training(epochs=6, batch_size=8, device="cpu", precision="32-true")
    )
    candidates = (
        lora("0-3.query 0-3.value 0-3.ffn_up", 8, dropout=0.2),
        lora("0-3.query 0-3.value 0-3.ffn_up", 8),
        lora("2-3.query 2-3.ffn_down", 4, dropout=0.1),
    )
    packed, again = (PackedTrainer(evaluator).train(candidates) for _ in range(2))
    assert [one.evaluation.curves for one in packed] == [one.evaluation.curves for one in again]
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


def test_a_memory_bound_splits_a_pack() -> None:
    evaluator = packing_evaluator()
    frozen = sum(one.numel() * one.element_size() for one in evaluator.backbone.model.state_dict().values())
    bound = int(frozen + 0.6 * sum(evaluator.costs(one)["peak_memory"] - frozen for one in LORAS))
    rows: list[int] = []
    handle = evaluator.backbone.model.register_forward_hook(
        lambda module, _inputs, output: rows.append(len(output.logits)) if module.training else None
    )
    packed = PackedTrainer(evaluator, max_bytes=bound).train(LORAS)
    handle.remove()
    assert 8 < max(rows) < 8 * len(LORAS)
    for configuration, trained in zip(LORAS, packed, strict=True):
        assert_alike(trained, evaluator.train(configuration))
    with pytest.raises(ValueError, match="max_bytes"):
        PackedTrainer(evaluator, max_bytes=0)


@pytest.mark.slow
def test_a_pack_keeps_to_its_memory_bound(
    minilm_folder: Path, questions_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = minilm_evaluator(minilm_folder, questions_csv)
    model = evaluator.backbone.model
    peaks: list[int] = []
    run = PackedTraining.run

    def counted(training: PackedTraining, seed: int) -> None:
        counter = StorageCounter()
        counter.exclude((*model.parameters(), *model.buffers()))
        with counter:
            run(training, seed)
        peaks.append(counter.peak_bytes)

    monkeypatch.setattr(PackedTraining, "run", counted)
    candidates = [lora("0-5.query 0-5.value", 8), lora("3-5.query", 4), lora("3-5.ffn_up", 4), of({})]
    PackedTrainer(evaluator).train(candidates)
    together = peaks.pop()
    room = int(0.7 * together)
    frozen = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    PackedTrainer(evaluator, max_bytes=frozen + room).train(candidates)
    assert len(peaks) == 2
    assert max(peaks) <= room


def test_costs_add_up_to_what_was_spent_and_higher_cuts_pay_less() -> None:
    evaluator = packing_evaluator(rows=240)
    PackedTrainer(evaluator).train(LORAS[:2])
    started = time.process_time()
    packed = PackedTrainer(evaluator).train(LORAS)
    spent = time.process_time() - started
    costs = [one.evaluation.cost for one in packed]
    assert sum(cost.cpu_seconds for cost in costs) == pytest.approx(spent, rel=0.1)
    assert costs[0].cpu_seconds > costs[2].cpu_seconds
    assert packed[0].evaluation.values["training_seconds"] > packed[2].evaluation.values["training_seconds"]


def test_shares_are_of_the_work_and_add_up() -> None:
    assert shares([2, 2], 4) == [0.5, 0.5]
    assert shares([4, 4], 4) == [0.5, 0.5]  # two heads: the frozen forward is all there is
    assert shares([0, 4], 4) == pytest.approx([8 / 12, 4 / 12])
    assert shares([1, 3, 3], 4)[0] == pytest.approx((6 + 1 / 3) / (6 + 2 + 2 + 1 + 2))
    assert sum(shares([0, 1, 2, 3, 4], 4)) == pytest.approx(1.0)


def test_gain_by_work() -> None:
    assert packing_gain([0] * 8, 6) == 1.0
    assert packing_gain([4], 6) == 1.0
    assert packing_gain([4] * 8, 6) == pytest.approx(64 / 36)
    assert packing_gain([0, 3], 6) == 1.0


def test_configurations_are_grouped_by_their_cuts() -> None:
    backbone = packing_backbone()
    high, higher, low, head = lora("2.query"), lora("3.query"), lora("0.query"), of({})
    packs = worthwhile_packs(backbone, (higher, low, high, head, high, low), max_size=3)
    assert packs == [[high, high, higher], [head], [low], [low]]
    assert worthwhile_packs(backbone, ()) == []
    with pytest.raises(ValueError, match="max_size"):
        worthwhile_packs(backbone, (low,), max_size=0)
