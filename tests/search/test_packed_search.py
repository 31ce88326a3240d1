"""Searches that train their new candidates together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from optuna.storages import JournalStorage

from autopeft import ParetoFront, Search, SuccessiveHalving
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.seeding import training_seed
from autopeft.evaluation.packing.loop import PackedCandidate
from autopeft.evaluation.packing.trainer import PackedTrainer, PackingError
from autopeft.evaluation.run import Trained
from autopeft.reporting.mlflow.run_content import TRIAL_TAG
from autopeft.reporting.search_profile import PROFILE_FOLDER
from autopeft.search_spaces import PerLayer, ScoreGuided, Uniform
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingCheckpoints
from autopeft.trial_runner import TrialRunner
from tests.learnable import tiny_evaluator, tiny_search
from tests.packed import WITHOUT_DROPOUT, assert_alike, lora, packing_backbone
from tests.tiny_models import tiny_backbone

TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true", frozen_blocks="eval")
HALVING = SuccessiveHalving(rungs=(1 / 3,), reduction_factor=2)


def packed_search(folder: Path, **settings: Any) -> Search:
    defaults: dict[str, Any] = {
        "backbone": packing_backbone(),
        "space": PerLayer(methods=("lora", "series"), ranks=(1, 8), widths=(1, 8)),
        "training": TRAINING,
        "objectives": ("accuracy", "trainable_parameters"),
        "pack_size": 4,
        "score_check": False,
    }
    return tiny_search(folder, **(defaults | settings))


def what_it_found(front: ParetoFront) -> list[tuple[Any, ...]]:
    return [
        (
            one.number,
            one.baseline,
            one.duplicate_of,
            one.evaluation.configuration,
            one.evaluation.status,
            one.evaluation.values.get("accuracy"),
            one.evaluation.seed,
            one.evaluation.by_seed.keys(),
        )
        for one in front.records
    ]


@pytest.mark.parametrize("fidelity", [None, HALVING], ids=("whole", "rungs"))
def test_trials_of_a_packed_search_are_what_they_are_alone(
    fidelity: SuccessiveHalving | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []
    train = PackedTrainer.train

    def counted(trainer: PackedTrainer, configurations: Any, *rest: Any, **how: Any) -> list[Trained]:
        packs.append(len(configurations))
        return train(trainer, configurations, *rest, **how)

    monkeypatch.setattr(PackedTrainer, "train", counted)
    search = packed_search(tmp_path, halving=fidelity)
    front = search.run(trials=10, progress=False)
    assert packs == [4, 4, 2]
    seeds = [record.evaluation.seed for record in front.records]
    assert seeds == [training_seed(0, number // 4 * 4) for number in range(10)]
    statuses = {record.evaluation.status for record in front.records}
    assert statuses == {"complete"} if fidelity is None else {"complete", "paused"}
    kept = AdapterCheckpoints(search.folder / "adapters")
    assert {path.name for path in kept.folder.iterdir()} == {
        f"trial-{number:05d}.safetensors" for number in front.members
    }
    for record in front.records:
        evaluation = record.evaluation
        rung = 0 if evaluation.status == "paused" else None
        alone = search.evaluator.train(evaluation.configuration, evaluation.seed, rung=rung)
        assert record.duplicate_of is None
        state = kept.load(record.number) if record.number in front.members else alone.state
        assert_alike(Trained(evaluation, state), alone, tolerance=5e-5)


MIXED_SETTINGS: Mapping[str, Any] = {
    "space": ScoreGuided(methods=("lora",), ranks=(1, 8)),
    "fidelity": HALVING,
    "seeds": 2,
}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> ParetoFront:
    """A search that nobody interrupts."""
    front = packed_search(tmp_path_factory.mktemp("uncut"), **MIXED_SETTINGS).run(trials=15, progress=False)
    assert {record.evaluation.status for record in front.records} >= {"complete", "paused"}
    assert any(record.evaluation.trainings == 2 for record in front.records)
    return front


def test_ctrl_c_in_a_callback_keeps_the_whole_pack(uncut: ParetoFront, tmp_path: Path) -> None:
    def stop(record: TrialRecord, front: ParetoFront) -> None:
        if record.number == 5:
            raise KeyboardInterrupt

    cut = packed_search(tmp_path, **MIXED_SETTINGS).run(trials=15, progress=False, callbacks=[stop])
    assert [record.number for record in cut.records] == list(range(8))
    again = packed_search(tmp_path, **MIXED_SETTINGS).run(trials=15, progress=False)
    assert what_it_found(again) == what_it_found(uncut)


@pytest.mark.parametrize("place", ["training", "pause"])
def test_ctrl_c_within_a_pack_lets_all_of_it_be_trained_again(
    place: str, uncut: ParetoFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is trained, and when half of its states are written."""
    cut = packed_search(tmp_path, **MIXED_SETTINGS)
    cut.validate()
    count = 0

    def interrupting(function: Any, at: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        if place == "training":
            patch.setattr(PackedCandidate, "step", interrupting(PackedCandidate.step, 4 * 6 + 7))
        else:
            patch.setattr(TrainingCheckpoints, "save", interrupting(TrainingCheckpoints.save, 6))
        front = cut.run(trials=15, progress=False)
    assert count
    assert len(front.records) in (0, 4)
    again = packed_search(tmp_path, **MIXED_SETTINGS).run(trials=15, progress=False)
    assert what_it_found(again) == what_it_found(uncut)


def test_ctrl_c_while_a_pack_is_recorded_keeps_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, count = JournalStorage.create_new_trial, 0

    def interrupting(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count == 4 + 2:  # the second of the second pack
            raise KeyboardInterrupt
        return add(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(JournalStorage, "create_new_trial", interrupting)
        front = packed_search(tmp_path, **MIXED_SETTINGS).run(trials=15, progress=False)
    assert [record.number for record in front.records] == [0, 1, 2, 3, 4]
    again = packed_search(tmp_path, **MIXED_SETTINGS).run(trials=15, progress=False)
    assert [record.number for record in again.records] == list(range(15))
    for before, after in zip(front.records, again.records, strict=False):
        assert after.evaluation.configuration == before.evaluation.configuration
        assert after.evaluation.seed == before.evaluation.seed


def test_the_same_configuration_is_trained_once_in_a_pack(tmp_path: Path) -> None:
    space = Uniform(ranks=(1, 2), learning_rate=1e-2)
    front = packed_search(tmp_path, space=space, pack_size=8, sampler="random").run(trials=24, progress=False)
    firsts: dict[Configuration, int] = {}
    for record in front.records:
        first = firsts.setdefault(record.evaluation.configuration, record.number)
        assert record.duplicate_of == (None if first == record.number else first)
    in_one_pack = [one for one in front.records if one.duplicate_of is not None and one.number < 8]
    assert in_one_pack
    assert len(front.records) == 24


def test_copies_of_one_failure_do_not_end_a_search(tmp_path: Path) -> None:
    space = Uniform(methods=("lora",), ranks=(1, 1), learning_rate=1e30)
    search = packed_search(tmp_path, space=space, pack_size=8, sampler="random", baselines=False)
    front = search.run(trials=8, progress=False)
    assert {record.evaluation.status for record in front.records} == {"failed"}
    assert [record.duplicate_of for record in front.records] == [None, *[0] * 7]


def test_infeasible_candidates_of_a_pack_do_not_count(tmp_path: Path) -> None:
    settings = {"sampler": "random", "baselines": False, "constraints": {"trainable_parameters": 800}}
    front = packed_search(tmp_path, **settings).run(trials=6, progress=False)
    statuses = Counter(record.evaluation.status for record in front.records)
    assert statuses["complete"] == 6
    assert statuses["infeasible"] > 0


def test_a_packed_search_keeps_candidates_apart(tmp_path: Path) -> None:
    """What is about to be trained counts as tried."""
    space = ScoreGuided(methods=("lora",), ranks=(1, 8), learning_rate=1e-2)
    front = packed_search(tmp_path, space=space, pack_size=8).run(trials=28, progress=False)
    proposed = [tuple(record.evaluation.configuration) for record in front.records[12:]]
    assert len(set(proposed)) > len(proposed) - 3


def test_packed_trials_are_runs_in_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    search = packed_search(tmp_path, tracking=uri, fidelity=HALVING)
    front = search.run(trials=6.0, progress=False)  # type: ignore[arg-type] # a whole number, as any
    runs = MlflowClient(tracking_uri=uri).search_runs(["1"], f"tags.`{TRIAL_TAG}` LIKE '%'")
    expected = {"complete": "FINISHED", "paused": "SCHEDULED"}
    assert {int(run.data.tags[TRIAL_TAG]): run.info.status for run in runs} == {
        record.number: expected[record.evaluation.status] for record in front.records
    }


def test_who_fails_in_a_pack_is_recorded_and_the_others_complete(tmp_path: Path) -> None:
    space = Uniform(ranks=(1, 8), learning_rate=(1e-3, 1e8))
    front = packed_search(tmp_path, space=space, baselines=False).run(trials=8, progress=False)
    outcomes = {record.evaluation.status: record.evaluation.reason for record in front.records}
    assert outcomes.keys() == {"complete", "failed"}
    assert str(outcomes["failed"]).startswith("diverged")


def test_a_pack_goes_on_from_what_it_left_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    search = packed_search(tmp_path, fidelity=HALVING)
    front = ParetoFront([], search.objectives, search.axes())
    training = TrialRunner(
        search.evaluator,
        AdapterCheckpoints(tmp_path),
        TrainingCheckpoints(tmp_path / "paused"),
        seed=0,
        seeds=1,
    )
    one, other, third = lora("3.query", 1), lora("2.query", 1), lora("1.query", 1)
    before = training.begin({0: one, 1: other}, front, rung=0)
    assert training.begin({0: one, 1: other}, front, rung=0) == before
    # One of them is missing, or was another: seeds and batches are those of the whole pack.
    after = training.begin({0: one, 1: third}, front, rung=0)
    assert after[1].evaluation.configuration == third
    assert [record.evaluation.seed for record in after.values()] == [training_seed(0, 0)] * 2
    assert after[0].evaluation.cost != before[0].evaluation.cost
    assert after[0].evaluation.values["accuracy"] == before[0].evaluation.values["accuracy"]


def test_a_backbone_that_cannot_be_packed_is_refused_before_anything_is_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"share_att_key": True, "num_hidden_layers": 4, **WITHOUT_DROPOUT["deberta-v2"]}
    backbone = tiny_backbone("deberta-v2", new_head=True, **options)
    search = packed_search(tmp_path, backbone=backbone, space=PerLayer(methods=("lora",), ranks=(1, 4)))
    with pytest.raises(PackingError, match="cannot be packed"):
        search.run(trials=4, progress=False)
    assert not search.folder.exists()
    # One that is found later, among configurations that can be packed, is trained alone.
    evaluator = tiny_evaluator(backbone, objectives=("accuracy", "trainable_parameters"))
    paused = TrainingCheckpoints(tmp_path)
    training = TrialRunner(evaluator, AdapterCheckpoints(tmp_path), paused, seed=0, seeds=1)
    front = ParetoFront([], evaluator.objectives, ())
    records = training.begin({3: lora("2.query"), 4: lora("3.query")}, front, rung=None)
    assert {record.evaluation.status for record in records.values()} == {"complete"}
    assert [record.evaluation.seed for record in records.values()] == [training_seed(0, n) for n in (3, 4)]
    assert "This is done for trials 3, 4." in caplog.text


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "4"])
def test_a_pack_size_that_is_no_number_of_candidates_is_an_error(size: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pack_size is a number of candidates from 1 up"):
        packed_search(tmp_path, pack_size=size)


def test_the_pack_size_is_part_of_what_a_search_is(tmp_path: Path) -> None:
    search, alone = packed_search(tmp_path), packed_search(tmp_path, pack_size=1)
    assert search.identity["search"]["pack_size"] == "4"
    assert "pack_size" not in alone.identity["search"]
    assert "up to 4 candidates train together" in search.describe()
    assert "together" not in alone.describe()


def test_a_profile_says_where_the_time_of_packs_went(tmp_path: Path) -> None:
    search = packed_search(tmp_path)
    search.run(trials=4, progress=False, profile=True)
    profile = json.loads((search.folder / PROFILE_FOLDER / "profile.json").read_text())
    spent = {name: one["calls"] for name, one in profile["sections"].items()}
    assert all(spent[name] for name in ("data", "forward", "backward", "optimizer", "evaluate", "set-up"))
    assert not spent["trainer"], "Lightning has trained some of them"
