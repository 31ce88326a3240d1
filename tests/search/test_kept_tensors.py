"""Which trained tensors a search keeps where the front is trained again: what is exported has to be there."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Evaluation, TrialRecord, with_replicate
from autopeft.core.jobs import New, Resume
from autopeft.core.seeding import training_seed
from autopeft.evaluation.run import Trained
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.optimization.seed_replication import under_replicated
from autopeft.reporting.front import ParetoFront
from autopeft.search_loop import FileCleanup
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.training_checkpoint import TrainingCheckpoints
from tests.optimization.test_promotion import AXES, OBJECTIVES, trial
from tests.optimization.test_seed_replication import evaluated, search


@dataclass
class Files:
    """The tensors that are kept, by the numbers of their trials and points."""

    numbers: set[int] = field(default_factory=set)

    def drop(self, numbers: Iterable[int]) -> None:
        self.numbers -= set(numbers)

    def keep_only(self, numbers: Iterable[int]) -> None:
        self.numbers &= set(numbers)


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_onto_the_front_has_its_tensors_and_little_else_is_kept(seed: int) -> None:
    """Other trials end while a member is trained again, which may then leave the front, or come back."""
    draw, files, seeds, trials = random.Random(seed), Files(), 3, 150
    objectives, axes = OBJECTIVES[:2], AXES[:2]
    running: set[int] = set()

    def cleanup() -> FileCleanup:
        checkpoints: Any = files
        paused: Any = SimpleNamespace(drop=id, numbers=set(), keep_only=id)
        return FileCleanup(checkpoints, paused, seeds, running)

    def measured(record: TrialRecord, training: int) -> TrialRecord:
        """Return a trial with other accuracies, of the points cut from it too."""

        def again(evaluation: Evaluation) -> Evaluation:
            accuracy = evaluation.values["expected"] + draw.gauss(0, 0.03)
            return replace(evaluation, values={**evaluation.values, "accuracy": accuracy}, seed=training)

        evaluation = again(record.evaluation)
        return replace(record, evaluation=replace(evaluation, derived=tuple(map(again, evaluation.derived))))

    def new(number: int) -> TrialRecord:
        record = trial(number, 10 ** draw.uniform(2, 6), 0.0, 0.0, 0.0)
        evaluation, points = record.evaluation, []
        for share in [1.0, 0.5, 0.25][: draw.randrange(1, 4)]:
            parameters = share * evaluation.values["trainable_parameters"]
            expected = 0.3 + 0.1 * math.log10(parameters) - draw.random() * 0.2
            values = {"trainable_parameters": parameters, "expected": expected}
            points.append(replace(evaluation, values={**evaluation.values, **values}))
        return measured(replace(record, evaluation=replace(points[0], derived=tuple(points[1:]))), 0)

    front, clean, kept, known, off_the_front = ParetoFront([], objectives, axes), cleanup(), 0, 0, False
    pending: list[TrialRecord] = []
    for number in range(trials):
        records = [new(number)]
        files.numbers |= {point.number for point in records[0].points}
        members = {front.trial(point.record.trained).record.number for point in front}
        lacking = under_replicated((front.trial(member).record for member in sorted(members)), seeds)
        if pending and draw.random() < 0.8:
            records.append(pending.pop())
            running.remove(records[-1].number)
        elif not pending and lacking:
            pending.append(draw.choice(lacking))
            running.add(pending[0].number)
        for record in records:
            if record.number != number:
                again = measured(record, record.evaluation.trainings).evaluation
                record = replace(record, evaluation=with_replicate(record.evaluation, again, {"accuracy": 0}))
            front = front.with_trial(record)
            clean(record, front)
            assert files.numbers >= front.members
            assert files.numbers >= {point.number for waiting in pending for point in waiting.points}
        off_the_front |= len(files.numbers) > len(front.members)
        kept, known = kept + len(files.numbers), known + len(front.records)
        if number == trials // 2:  # the search is resumed
            before = set(files.numbers)
            clean = cleanup()
            clean.tidy(front)
            assert files.numbers == before
    assert off_the_front
    assert kept < 0.7 * known


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_tensors_are_kept_while_members_may_yet_fall(seed: int, tmp_path: Path) -> None:
    """What a member beats that was trained once may come onto the front, and is then to have its tensors."""
    small_search = search(tmp_path, seed=seed)
    off_the_front = 0

    def watch(record: TrialRecord, front: ParetoFront) -> None:
        nonlocal off_the_front
        kept = names()
        repeated = {record.number for record in front.records if record.evaluation.by_seed}
        assert kept >= files(front.members)
        off_the_front += len(kept) > len(front.members | repeated)

    def names() -> set[str]:
        return {path.name for path in (small_search.folder / "adapters").iterdir()}

    def files(numbers: Collection[int]) -> set[str]:
        return {f"trial-{number:05d}.safetensors" for number in numbers}

    front = small_search.run(trials=12, progress=False, callbacks=[watch])
    assert off_the_front
    repeated = {record.number for record in front.records if record.evaluation.by_seed}
    assert names() == files(front.members | repeated)


def test_a_trial_that_is_recorded_has_its_files(tmp_path: Path) -> None:
    """Tensors of trials off the front are dropped afterwards, by a listener."""
    small_search = search(tmp_path, baselines=False)
    checkpoints = AdapterCheckpoints(tmp_path / "adapters")
    paused = TrainingCheckpoints(tmp_path / "paused")
    runner = TrialRunner(small_search.open().evaluator, checkpoints, paused, seed=0)
    record = runner.run(New(number=1, configuration=Configuration({})))
    assert checkpoints.seed(record) == training_seed(0, 1)
    values = {"accuracy": 1.0, "f1": 1.0, "trainable_parameters": 1.0, "peak_memory": 1.0}
    best = TrialRecord(number=0, evaluation=replace(evaluated(1, 1.0), values=values))
    front = ParetoFront([best, record], small_search.objectives, small_search.open().axes)
    assert front.members == {0}
    FileCleanup(checkpoints, paused, seeds=2, running=())(record, front)
    assert checkpoints.seed(record) is not None, "the member was trained once and may yet fall"
    FileCleanup(checkpoints, paused, seeds=1, running=(1,))(record, front)
    assert checkpoints.seed(record) is not None, "another job may have written it"
    FileCleanup(checkpoints, paused, seeds=1, running=())(record, front)
    assert checkpoints.seed(record) is None


def test_a_search_begins_without_what_workers_left_of_trials_that_are_over(tmp_path: Path) -> None:
    """One that was cut off while it trained may pause a trial after another process has ended it."""
    paused = TrainingCheckpoints(tmp_path)
    waiting = replace(evaluated(1, 1.0), status="paused")
    records = [TrialRecord(number=0, evaluation=evaluated(1, 1.0)), TrialRecord(number=1, evaluation=waiting)]
    for number in range(3):  # the last is not recorded yet
        paused.path(number).write_bytes(b"")
    for name in ("trial-00000.host.1.part", "trial-00001.host.1.part", "trial-00000.safetensors.damaged"):
        (tmp_path / name).write_bytes(b"")
    front = ParetoFront(records, OBJECTIVES[:2], AXES[:2])
    FileCleanup(AdapterCheckpoints(tmp_path / "adapters"), paused, seeds=1, running=()).tidy(front)
    assert set(tmp_path.iterdir()) == {paused.path(1), paused.path(2)}


@pytest.mark.parametrize("rank", [4, 8])
def test_a_trial_does_not_go_on_from_a_pause_of_another_configuration(rank: int, tmp_path: Path) -> None:
    """A worker that outlived its search may have written it."""
    record = trial(3, 1e3, 0.5)  # of rank 4
    configuration = Configuration({Site(0, "query"): Adapter("lora", rank)})
    left = SimpleNamespace(evaluation=replace(record.evaluation, configuration=configuration))
    paused: Any = SimpleNamespace(load=lambda number: left)
    given: list[Any] = []

    def train(configuration: Configuration, seed: int, **options: Any) -> Trained:
        given.append(options["paused"])
        return Trained(record.evaluation)

    evaluator: Any = SimpleNamespace(train=train)
    TrialRunner(evaluator, AdapterCheckpoints(tmp_path), paused, seed=0).run(Resume(record=record, rung=1))
    assert given == [left if rank == 4 else None]


@pytest.mark.slow
def test_the_tensors_of_the_better_training_are_kept(tmp_path: Path) -> None:
    small_search = search(tmp_path, seeds=3, seed=0)
    front = small_search.run(trials=8, progress=False)
    best = []
    for record in front.records:
        trainings, configuration = record.evaluation.by_seed, record.evaluation.configuration
        if not trainings:
            continue
        kept = AdapterCheckpoints(small_search.folder / "adapters").load(record)
        assert kept is not None
        same = [
            seed
            for seed in trainings
            if _same(kept, small_search.open().evaluator.train(configuration, seed).state)
        ]
        assert len(same) == 1
        assert AdapterCheckpoints(small_search.folder / "adapters").seed(record) == same[0]
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
    assert {number: kept.seed(front.trial(number).record) for number in better} == better


def _number_of_training(seed: int, trial: int, training: int = 0) -> int:
    return training


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor] | None) -> bool:
    return second is not None and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
