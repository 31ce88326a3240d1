"""Jobs that are trained together: what goes into a pack, when records come, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import Tensor, nn

from autopeft.core.jobs import Job, New, Replicate, Resume
from autopeft.core.objectives import resolve_objectives
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.packing.executor import PackedExecutor
from autopeft.evaluation.packing.trainer import PackedTrainer
from autopeft.evaluation.run import Trained
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.models.backbone import Backbone
from autopeft.tasks import CausalLM, PreferenceOptimization, Seq2Seq, TextClassification
from autopeft.tasks.dataset_task import DatasetTask
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.training_checkpoint import TrainingCheckpoints
from tests.packed import LORAS, OTHER_METHODS, TRAINING, assert_alike, lora, packing_evaluator
from tests.task_cases import compared_rows, splits_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model


@pytest.fixture
def runner(tmp_path: Path) -> TrialRunner:
    evaluator = packing_evaluator(rungs=(0.5,), objectives=("accuracy", "trainable_parameters"))
    checkpoints, paused = AdapterCheckpoints(tmp_path / "adapters"), TrainingCheckpoints(tmp_path / "paused")
    return TrialRunner(evaluator, checkpoints, paused, seed=0)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of the packs, filled as they are trained."""
    sizes: list[int] = []
    train = PackedTrainer.train

    def counted(trainer: PackedTrainer, configurations: Any, *rest: Any, **options: Any) -> list[Trained]:
        sizes.append(len(configurations))
        return train(trainer, configurations, *rest, **options)

    monkeypatch.setattr(PackedTrainer, "train", counted)
    return sizes


def run_all(runner: TrialRunner, jobs: list[Job]) -> list[Any]:
    executor = PackedExecutor(size=len(jobs))(runner)
    for left, job in enumerate(jobs):
        assert executor.free == len(jobs) - left
        executor.submit(job)
    assert executor.free == 0
    records = [executor.wait() for _ in jobs]
    assert executor.free == len(jobs)
    executor.close()
    return records


def test_new_lora_trials_train_together_and_other_jobs_alone(runner: TrialRunner, packs: list[int]) -> None:
    whole = runner.run(New(number=0, configuration=LORAS[0]))
    paused = runner.run(New(number=1, configuration=LORAS[1], rung=0))
    jobs: list[Job] = [
        New(number=2, configuration=LORAS[2], rung=0),
        Replicate(record=whole, training=1),
        New(number=3, configuration=OTHER_METHODS[0], rung=0),
        New(number=4, configuration=LORAS[3], rung=0, baseline="head alone"),
        Resume(record=paused, rung=1),
        New(number=5, configuration=LORAS[4]),  # whole: with another end than the pack's
        New(number=6, configuration=LORAS[4], rung=0),
    ]
    records = {record.number: record for record in run_all(runner, jobs)}
    assert packs == [3]
    assert sorted(records) == [0, 1, 2, 3, 4, 5, 6]
    assert records[0].evaluation.trainings == 2
    assert records[1].evaluation.status == "complete"
    assert records[4].baseline == "head alone"
    for number in (2, 4, 6):
        evaluation = records[number].evaluation
        assert evaluation.seed == training_seed(0, 2)
        alone = runner.evaluator.train(evaluation.configuration, evaluation.seed, rung=0)
        assert_alike(replace(alone, evaluation=evaluation), alone)
        resumed = runner.run(Resume(record=records[number], rung=1))  # from the file that the pack left
        assert resumed.evaluation.status == "complete"
    for number in (3, 5):
        assert records[number].evaluation.seed == training_seed(0, number)


def test_trials_of_a_task_with_a_reference_are_trained_alone(
    tmp_path: Path, packs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    task = PreferenceOptimization(splits_of(compared_rows))
    backbone = Backbone.load(tiny_language_model("llama"), task.head, tiny_chat_tokenizer())
    objectives = resolve_objectives(("loss", "trainable_parameters"), task.metrics)
    training = replace(TRAINING, epochs=1)
    evaluator = Evaluator(backbone, task, training, objectives)
    checkpoints, paused = AdapterCheckpoints(tmp_path / "adapters"), TrainingCheckpoints(tmp_path / "paused")
    jobs: list[Job] = [New(number=number, configuration=lora("1.query", number + 1)) for number in range(2)]
    records = run_all(TrialRunner(evaluator, checkpoints, paused, seed=0), jobs)
    assert [record.evaluation.status for record in records] == ["complete", "complete"]
    assert [record.evaluation.seed for record in records] == [training_seed(0, number) for number in range(2)]
    assert not packs
    assert "is halved" not in caplog.text


def test_what_forward_is_decides_whether_trials_share_a_pass() -> None:
    class Warmer(TextClassification):
        def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
            return super().forward(model, batch)

    class Longer(CausalLM):
        def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
            return super().forward(model, batch)

    tasks: tuple[type[DatasetTask], ...] = (TextClassification, CausalLM)
    assert [made(Dataset.from_dict({})).is_one_pass for made in tasks] == [True, True]
    others: tuple[type[DatasetTask], ...] = (PreferenceOptimization, Seq2Seq, Warmer, Longer)
    assert not any(made(Dataset.from_dict({})).is_one_pass for made in others)


def test_trained_tensors_are_kept_with_a_trials_own_record(runner: TrialRunner, tmp_path: Path) -> None:
    """The loop deletes the tensors of trials that are not on the front of the records."""
    executor = PackedExecutor(size=2)(runner)
    kept = AdapterCheckpoints(tmp_path / "adapters")
    for number in range(2):
        executor.submit(New(number=number, configuration=LORAS[number]))
    for number in range(2):
        record = executor.wait()
        assert record is not None
        assert record.number == number
        assert executor.free == (2 if number else 0)  # 0 while a record is to be taken
        assert kept.load(record) is not None
        kept.keep_only(set())


def test_a_trial_that_fails_in_a_pack_is_a_record_and_the_others_complete(runner: TrialRunner) -> None:
    wild = lora("1-3.query 1-3.value", 3, 1e30)
    jobs: list[Job] = [
        New(number=number, configuration=configuration)
        for number, configuration in enumerate((LORAS[0], wild, LORAS[2]))
    ]
    records = run_all(runner, jobs)
    assert [record.evaluation.status for record in records] == ["complete", "failed", "complete"]
    assert str(records[1].evaluation.reason).startswith("diverged")


def test_what_a_killed_process_left_of_a_trial_is_resumed_alone(
    runner: TrialRunner, packs: list[int]
) -> None:
    jobs: list[Job] = [New(number=number, configuration=LORAS[number], rung=0) for number in range(3)]
    first = runner.run(jobs[0])  # and was not recorded
    records = {record.number: record for record in run_all(runner, jobs)}
    assert packs == [2]
    assert records[0] == first
    assert records[1].evaluation.seed == records[2].evaluation.seed == training_seed(0, 1)
