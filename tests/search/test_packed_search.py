"""Searches that train their new LoRA trials together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopeft import ParetoFront, Search, SuccessiveHalving
from autopeft.core.evaluation import TrialRecord
from autopeft.core.seeding import training_seed
from autopeft.evaluation.packing.executor import PackedExecutor
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.run import Trained
from autopeft.reporting.search_report import PROFILE_FOLDER
from autopeft.search_spaces import PerLayer, ScoreGuided, Uniform
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.settings import Training
from tests.learnable import outcomes, tiny_search
from tests.packed import assert_alike, packing_backbone

pytestmark = pytest.mark.slow  # `test_packed_executor` tries the executor in `make test`

TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true", frozen_blocks="eval")
HALVING = SuccessiveHalving(rungs=(1 / 3,), reduction_factor=2)


def packed_search(folder: Path, *, size: int = 4, **settings: Any) -> Search:
    defaults: dict[str, Any] = {
        "backbone": packing_backbone(),
        "space": PerLayer(methods=("lora", "series"), sizes={"rank": (1, 8), "bottleneck width": (1, 8)}),
        "training": TRAINING,
        "objectives": ("accuracy", "trainable_parameters"),
        "executor": PackedExecutor(size=size),
    }
    return tiny_search(folder, **(defaults | settings))


@pytest.mark.parametrize(
    "halving", [None, pytest.param(HALVING, marks=pytest.mark.slow)], ids=("whole", "rungs")
)
def test_trials_of_a_packed_search_are_what_they_are_alone(
    halving: SuccessiveHalving | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[int] = []
    train = PackedTrainer.train

    def counted(trainer: PackedTrainer, configurations: Any, *rest: Any, **how: Any) -> list[Trained]:
        packs.append(len(configurations))
        return train(trainer, configurations, *rest, **how)

    monkeypatch.setattr(PackedTrainer, "train", counted)
    search = packed_search(tmp_path, halving=halving)
    front = search.run(trials=10, progress=False)
    assert max(packs) > 1
    kept = AdapterCheckpoints(search.folder / "adapters")
    evaluator = search.open().evaluator
    statuses = {record.evaluation.status for record in front.records}
    assert statuses == ({"complete"} if halving is None else {"complete", "paused"})
    for record in front.records:
        evaluation = record.evaluation
        assert record.duplicate_of is None
        rung = 0 if evaluation.status == "paused" else None
        alone = evaluator.train(evaluation.configuration, evaluation.seed, rung=rung)
        state = kept.load(record) if record.number in front.members else alone.state
        assert_alike(Trained(evaluation, state), alone, tolerance=5e-5)


def test_a_pack_has_the_seed_of_its_first_trial(tmp_path: Path) -> None:
    space = Uniform(sizes={"rank": (1, 8)}, learning_rate=(1e-3, 1e-2))
    front = packed_search(tmp_path, space=space, baselines=False).run(trials=8, progress=False)
    seeds = [record.evaluation.seed for record in front.records if record.duplicate_of is None]
    assert seeds == [training_seed(0, number // 4 * 4) for number in range(8)]


@pytest.mark.slow
def test_an_interrupted_search_finds_what_an_uninterrupted_one_finds(tmp_path: Path) -> None:
    """Ctrl-C comes while the records of a pack are taken; what was taken is kept."""
    settings: dict[str, Any] = {"space": ScoreGuided(methods=("lora",), sizes={"rank": (1, 8)}), "seeds": 2}

    def stop(record: TrialRecord, front: ParetoFront) -> None:
        if record.number == 3:
            raise KeyboardInterrupt

    whole = packed_search(tmp_path / "whole", **settings).run(trials=8, progress=False)
    cut = packed_search(tmp_path / "cut", **settings).run(trials=8, progress=False, callbacks=[stop])
    assert [record.number for record in cut.records] == list(range(4))
    again = packed_search(tmp_path / "cut", **settings).run(trials=8, progress=False)
    assert outcomes(again.records) == outcomes(whole.records)


def test_the_same_configuration_is_trained_once(tmp_path: Path) -> None:
    space = Uniform(sizes={"rank": (1, 2)}, learning_rate=1e-2)
    front = packed_search(tmp_path, space=space, size=8, sampler="random").run(trials=12, progress=False)
    firsts: dict[Any, int] = {}
    for record in front.records:
        first = firsts.setdefault(record.evaluation.configuration, record.number)
        assert record.duplicate_of == (None if first == record.number else first)


def test_a_trial_that_fails_in_a_pack_is_recorded_and_the_others_complete(tmp_path: Path) -> None:
    space = Uniform(sizes={"rank": (1, 8)}, learning_rate=(1e-3, 1e8))
    front = packed_search(tmp_path, space=space, baselines=False).run(trials=8, progress=False)
    reasons = {record.evaluation.status: record.evaluation.reason for record in front.records}
    assert reasons.keys() == {"complete", "failed"}
    assert str(reasons["failed"]).startswith("diverged")


@pytest.mark.parametrize("size", [0, 1, -1, 2.5, "four"])
def test_a_size_that_is_no_number_of_trials_is_an_error(size: Any) -> None:
    with pytest.raises(ValueError, match="size is a number of trials from 2 up"):
        PackedExecutor(size=size)


def test_the_executor_is_part_of_what_a_search_is(tmp_path: Path) -> None:
    packed_search(tmp_path).run(trials=1, progress=False)
    with pytest.raises(ValueError, match="executor"):
        packed_search(tmp_path, executor="local").run(trials=2, progress=False)


def test_baselines_in_packs_are_initialised_from_random_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "space": PerLayer(methods=("lora",), sizes={"rank": (1, 8)}),
        "warm_start": True,
    }
    records = packed_search(tmp_path, **settings).run(trials=8, progress=False).records
    assert {record.baseline is None for record in records} == {True, False}
    for record in records:
        assert record.evaluation.warm_start == (record.baseline is None)


def test_a_profile_says_where_the_time_of_packs_went(tmp_path: Path) -> None:
    search = packed_search(
        tmp_path, space=PerLayer(methods=("lora",), sizes={"rank": (1, 8)}), halving=None, seeds=1
    )
    search.run(trials=4, progress=False, profile=True)
    profile = json.loads((search.folder / PROFILE_FOLDER / "profile.json").read_text())
    calls = {name: values["calls"] for name, values in profile["sections"].items()}
    assert all(calls[name] for name in ("data", "forward", "backward", "optimizer", "evaluate", "set-up"))
    assert not calls["trainer"], "Lightning has trained some of them"
