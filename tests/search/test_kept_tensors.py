"""Which trained tensors a search keeps where the front is trained again: what is exported has to be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import New
from autopeft.core.seeding import training_seed
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.reporting.front import ParetoFront
from autopeft.search_loop import FileCleanup
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.training_checkpoint import TrainingCheckpoints
from tests.optimization.test_seed_replication import evaluated, search


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_tensors_are_kept_while_members_may_yet_fall(seed: int, tmp_path: Path) -> None:
    """Whom a member beats that was trained once may come onto the front, and is then to have its tensors."""
    small_search = search(tmp_path, seed=seed)
    seen: set[str] = set()
    off_the_front = 0

    def watch(record: TrialRecord, front: ParetoFront) -> None:
        nonlocal seen, off_the_front
        kept = names()
        repeated = {record.number for record in front.records if record.evaluation.by_seed}
        if any(point.record.evaluation.trainings < 2 for point in front):
            assert kept >= seen
            off_the_front += len(kept) > len(front.members | repeated)
        seen = kept

    def names() -> set[str]:
        return {path.name for path in (small_search.folder / "adapters").iterdir()}

    front = small_search.run(trials=12, progress=False, callbacks=[watch])
    assert off_the_front
    repeated = {record.number for record in front.records if record.evaluation.by_seed}
    assert names() == {f"trial-{number:05d}.safetensors" for number in front.members | repeated}


def test_a_trial_that_is_recorded_has_its_files(tmp_path: Path) -> None:
    """Tensors of trials off the front are dropped afterwards, by a listener."""
    small_search = search(tmp_path, baselines=False)
    checkpoints = AdapterCheckpoints(tmp_path / "adapters")
    paused = TrainingCheckpoints(tmp_path / "paused")
    runner = TrialRunner(small_search.open().evaluator, checkpoints, paused, seed=0)
    record = runner.run(New(number=1, configuration=Configuration({})))
    assert checkpoints.seed(1) == training_seed(0, 1)
    values = {"accuracy": 1.0, "f1": 1.0, "trainable_parameters": 1.0, "peak_memory": 1.0}
    best = TrialRecord(number=0, evaluation=replace(evaluated(1, 1.0), values=values))
    front = ParetoFront([best, record], small_search.objectives, small_search.open().axes)
    assert front.members == {0}
    FileCleanup(checkpoints, paused, seeds=2)(record, front)
    assert checkpoints.seed(1) is not None, "the member was trained once and may yet fall"
    FileCleanup(checkpoints, paused, seeds=1)(record, front)
    assert checkpoints.seed(1) is None


@pytest.mark.slow
def test_the_tensors_of_the_better_training_are_kept(tmp_path: Path) -> None:
    small_search = search(tmp_path, seeds=3, seed=0)
    front = small_search.run(trials=8, progress=False)
    best = []
    for record in front.records:
        trainings, configuration = record.evaluation.by_seed, record.evaluation.configuration
        if not trainings:
            continue
        kept = AdapterCheckpoints(small_search.folder / "adapters").load(record.number)
        assert kept is not None
        same = [
            seed
            for seed in trainings
            if _same(kept, small_search.open().evaluator.train(configuration, seed).state)
        ]
        assert len(same) == 1
        assert AdapterCheckpoints(small_search.folder / "adapters").seed(record.number) == same[0]
        ranking = sorted(trainings, key=lambda seed: -trainings[seed]["accuracy"])  # the first of equals
        assert same[0] == ranking[0]
        best.append(ranking[0] != next(iter(trainings)))
    assert any(best)


def test_tensors_of_a_training_with_seed_0_are_kept_as_others_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.evaluation.trial_runner.training_seed", _number_of_training)
    small_search = search(tmp_path)
    front = small_search.run(trials=8, progress=False)
    kept = AdapterCheckpoints(small_search.folder / "adapters")
    better = {
        record.number: max(trainings, key=lambda seed: trainings[seed]["accuracy"])  # the first of equals
        for record in front.records
        if (trainings := record.evaluation.by_seed)
    }
    assert 0 in better.values()
    assert {number: kept.seed(number) for number in better} == better


def _number_of_training(seed: int, trial: int, training: int = 0) -> int:
    return training


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor] | None) -> bool:
    return second is not None and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
