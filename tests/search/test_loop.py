"""The loop of a search: trials that finish out of order, interrupts, failures, and what is kept."""

from __future__ import annotations

import errno
import logging
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.samplers import RandomSampler

from autopeft import Search, SuccessiveHalving
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Job
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.executor import LocalExecutor
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.optimization.proposal import History
from autopeft.optimization.study_store import load_study
from autopeft.search_spaces import PerLayer, ScoreGuided, SearchSpace, Uniform
from autopeft.training.settings import Training
from tests.learnable import learnable_task, learner, outcomes, tiny_search

TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true")


class Shuffled(LocalExecutor):
    """Takes several jobs, and finishes them in any order."""

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__(runner)
        self._generator = random.Random(3)
        self.taken: list[Job] = []

    @property
    def free(self) -> int:
        return 4 - len(self._jobs)

    def submit(self, job: Job) -> None:
        assert job.number not in [other.number for other in self._jobs]
        super().submit(job)

    def wait(self) -> TrialRecord:
        self._jobs.rotate(self._generator.randrange(4))
        return super().wait()


def test_trials_may_finish_out_of_order(tmp_path: Path) -> None:
    order: list[int] = []
    search = tiny_search(
        tmp_path,
        executor=Shuffled,
        space=PerLayer(methods=("lora",), sizes={"rank": (1, 4)}),
        halving=SuccessiveHalving(rungs=(1 / 3,), reduction_factor=2),
        training=TRAINING,
        seeds=2,
        sampler="ehvi",
    )
    front = search.run(
        trials=10, progress=False, callbacks=[lambda record, front: order.append(record.number)]
    )
    assert [record.number for record in front.records] == list(range(10))
    begun = list(dict.fromkeys(order))
    assert begun != sorted(begun)
    assert all(point.record.evaluation.trainings == 2 for point in front)
    _, records = load_study(search.folder)
    assert records == list(front.records)
    assert search.front().members == front.members


def test_an_executor_is_named_or_makes_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown executor 'locl'.*local"):
        tiny_search(tmp_path, executor="locl")


class Counted(LocalExecutor):
    """Counts those that were not closed."""

    open = 0

    def __init__(self, runner: TrialRunner) -> None:
        super().__init__(runner)
        Counted.open += 1

    def close(self) -> None:
        super().close()
        Counted.open -= 1


@pytest.mark.parametrize("place", ["FileCleanup.tidy", "Scheduler"])
def test_an_executor_is_closed_whatever_fails(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"autopeft.search_run.{place}", full)
    with pytest.raises(OSError, match="No space left"):
        tiny_search(tmp_path, executor=Counted).run(trials=1, progress=False)
    assert Counted.open == 0


class OwnSampler(RandomSampler):
    """A user's sampler."""

    def __init__(self, scale: float = 1.0, weight: Callable[[int], float] = float) -> None:
        super().__init__()
        self.scale, self._weight = scale, weight


def test_a_samplers_arguments_are_settings(tmp_path: Path) -> None:
    def half(number: int) -> float:
        return number / 2

    samplers = [OwnSampler(), OwnSampler(2.0), OwnSampler(weight=half), OwnSampler(weight=half)]
    searches = [tiny_search(tmp_path, name=None, sampler=sampler) for sampler in samplers]
    assert len({search.name for search in searches}) == 3
    assert searches[2].name == searches[3].name, "an object like it is no other setting"
    assert f"sampler {__name__}.OwnSampler(scale=2.0, weight=builtins.float)" in searches[1].describe()


class SmallestFirst:
    """A user's sampler that reads the history."""

    def choose(self, number: int, space: SearchSpace, backbone: Backbone, history: History) -> Configuration:
        drawn = [space.draw(random.Random(f"{number} {each}"), backbone) for each in range(8)]
        tried = {configuration for configuration, _ in history.trials}
        new = [configuration for configuration in drawn if configuration not in tried]
        return min(new or drawn, key=lambda configuration: count_parameters(backbone, configuration))


def test_a_sampler_of_ones_own_may_read_the_history(tmp_path: Path) -> None:
    space = PerLayer(methods=("lora",), sizes={"rank": (1, 4)})
    search = tiny_search(tmp_path, sampler=SmallestFirst(), space=space, baselines=False)
    assert f"sampler {__name__}.SmallestFirst()" in search.describe()
    tried = [record.evaluation.configuration for record in search.run(trials=3, progress=False).records]
    backbone, again = search.open().backbone, SmallestFirst()
    history = History(trials=[(configuration, {}) for configuration in tried[:2]], axes=())
    assert tried[2] == again.choose(2, search.open().space, backbone, history)
    assert len({*tried}) == 3


def test_two_arguments_give_the_default_strategy(tmp_path: Path) -> None:
    search = Search("a/model", learnable_task())
    assert search.space == ScoreGuided()
    assert search.halving == SuccessiveHalving()
    assert (search.sampler, search.seeds, search.warm_start) == ("ehvi", 3, False)
    assert not search.score_check
    front = Search(learner(), learnable_task(), training=TRAINING, tracking=None, folder=tmp_path).run(
        trials=6, progress=False
    )
    assert len(front.records) == 6
    assert all(point.record.evaluation.trainings == 3 for point in front)


def test_name_folder_and_front_load_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = tiny_search(tmp_path, name=None)
    front = search.run(trials=2, progress=False)

    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Backbone, "load", loaded)
    monkeypatch.setattr("autopeft.tasks.TextClassification.data", loaded)
    monkeypatch.setattr("autopeft.tasks.TextClassification.identity", loaded)
    other = tiny_search(tmp_path, name=None)
    assert other.name == search.name
    assert other.folder == search.folder
    found = other.front()
    assert found.members == front.members
    assert found.hypervolume == front.hypervolume
    assert outcomes(found.records) == outcomes(front.records)
    assert Search("no/such-model", learnable_task()).name.startswith("text-classification-no-such-model-")


def test_an_interrupt_while_scores_are_computed_leaves_a_search_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = tiny_search(tmp_path, space=ScoreGuided(sizes={"rank": (1, 4)}), sampler="ehvi")
    with monkeypatch.context() as patch:

        def interrupted(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("autopeft.opened_search.score_sites", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search.run(trials=2, progress=False)
    assert len(search.run(trials=2, progress=False).records) == 2


@contextmanager
def in_training(search: Search, act: Any) -> Iterator[None]:
    """Call something in each training forward pass."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if module.training and type(output.logits) is torch.Tensor and not output.logits.is_meta:
            act()

    handle = search.open().backbone.model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_interrupt_ends_the_search_after_the_trial(tmp_path: Path) -> None:
    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    search = tiny_search(tmp_path)
    kept = [Dropping()]
    with in_training(search, kept.clear):
        front = search.run(trials=3, progress=False)
    assert len(front.records) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(search.run(trials=3, progress=False).records) == 3


def test_failed_trials_are_tried_again_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("autopeft.evaluation.run").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "baselines": False,
        "space": Uniform(sizes={"rank": (1, 8)}, learning_rate=(1e-4, 1e-2)),
    }
    search = tiny_search(tmp_path, **settings)

    def fail() -> None:
        raise RuntimeError("a mistake in a task")

    with in_training(search, fail):
        front = search.run(trials=3, progress=False)
    logging.getLogger("autopeft.evaluation.run").setLevel(logging.NOTSET)
    assert len(front) == 0
    failed = front.records
    capsys.readouterr()
    assert len(tiny_search(tmp_path, **settings).run(trials=3)) == 0
    shown = capsys.readouterr().out
    assert (
        "Resuming with 3 trials: 3 failed. Failed trials are tried again by run(..., retry_failed=True)."
        in shown
    )
    again = tiny_search(tmp_path, **settings).run(trials=3, progress=False, retry_failed=True)
    assert [record.evaluation.status for record in again.records] == ["complete"] * 3
    assert len(again) > 0
    for before, after in zip(failed, again.records, strict=True):
        assert after.evaluation.configuration == before.evaluation.configuration
        assert after.evaluation.cost.cpu_seconds > before.evaluation.cost.cpu_seconds
        assert after.evaluation.cost.steps == 6
    assert load_study(search.folder)[1] == list(again.records)


def test_what_is_promising_and_paused_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tiny_search(
        tmp_path,
        baselines=False,
        task=learnable_task(rows=96),
        space=Uniform(sizes={"rank": (1, 8)}, learning_rate=1e-2),
        halving=SuccessiveHalving(rungs=(2 / 3,), reduction_factor=9),
        training=replace(TRAINING, epochs=6),
    )
    front = search.run(cpu_seconds=1e-3)
    assert [record.evaluation.status for record in front.records] == ["paused"]
    assert "1 promising trial is paused (0): run more to train on." in capsys.readouterr().out
    front = search.run(trials=1)
    assert [record.evaluation.status for record in front.records] == ["complete"]
    assert "promising" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_scores_are_checked_on_request_and_within_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("autopeft.search_run.FEWEST_TRIALS", 1)
    monkeypatch.setattr(Search, "sensitivity", lambda search: calls.append(1))
    tiny_search(tmp_path, name="off").run(trials=1, progress=False)
    assert not calls
    tiny_search(tmp_path, name="spent", score_check=True).run(cpu_seconds=1e-3)
    assert not calls
    assert "The budget is spent: the scores are not checked" in capsys.readouterr().out
    logging.getLogger("autopeft.search_run").setLevel(logging.ERROR)
    tiny_search(tmp_path, name="on", score_check=True).run(trials=1, progress=False)
    logging.getLogger("autopeft.search_run").setLevel(logging.NOTSET)
    assert calls


def test_the_terminal_says_once_how_much_memory_the_process_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_search(tmp_path, objectives=("accuracy", "peak_memory")).run(trials=2)
    assert capsys.readouterr().out.count("of main memory") == 1


def test_an_export_off_the_front_says_that_it_trains_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = tiny_search(tmp_path, objectives=("accuracy", "trainable_parameters"))
    front = search.run(trials=4, progress=False)
    number = next(record.number for record in front.records if record.number not in front.members)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="not empty"):
        search.export(number, tmp_path / "out")
    assert f"Trial {number} is not on the front" in caplog.text


def test_a_tracker_that_does_not_start_leaves_the_search_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while MLflow's run is opened: it must not stay RUNNING."""
    from autopeft.reporting.mlflow.tracker import MlflowTracker

    ended: list[str] = []

    def interrupted(self: MlflowTracker, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowTracker, "start", interrupted)
    monkeypatch.setattr(MlflowTracker, "publish_front", lambda self, *arguments: None)
    monkeypatch.setattr(MlflowTracker, "finish", lambda self, status, records: ended.append(status))
    front = tiny_search(tmp_path, tracking=f"sqlite:///{tmp_path}/mlflow.db").run(trials=1, progress=False)
    assert len(front.records) == 0
    assert ended == ["KILLED"]


def test_adapter_parameters_can_be_an_objective(tmp_path: Path) -> None:
    objectives = ("accuracy", "adapter_parameters")
    space = ScoreGuided(sizes={"rank": (1, 4)}, learning_rate=(3e-4, 1e-2))
    search = tiny_search(tmp_path, objectives=objectives, space=space, sampler="ehvi")
    front = search.run(trials=6, progress=False)
    head = search.open().backbone.head_parameters
    for record in front.records:
        values = record.evaluation.values
        assert values["adapter_parameters"] == values["trainable_parameters"] - head
    assert 0 < front.hypervolume <= 1
    assert isinstance(search.open().evaluator, Evaluator)


def test_exporting_what_never_completed_says_why(tmp_path: Path) -> None:
    space = Uniform(sizes={"rank": (1, 16)})
    probe = tiny_search(tmp_path, space=space)
    bound = count_parameters(probe.open().backbone, probe.open().space.extremes(probe.open().backbone)[0])
    search = tiny_search(tmp_path, space=space, constraints={"trainable_parameters": bound})
    front = search.run(trials=3, progress=False)
    number = next(record.number for record in front.records if record.evaluation.status == "infeasible")
    with pytest.raises(
        ValueError, match=rf"Trial {number} infeasible \(trainable_parameters .*nothing to export"
    ):
        search.export(number, tmp_path / "out")
    with pytest.raises(ValueError, match="There is no trial 99"):
        search.export(99, tmp_path / "out")
