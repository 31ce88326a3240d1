"""Trials trained by real Ray workers of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from autopeft import RayExecutor, Search, SuccessiveHalving, Training
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New
from autopeft.evaluation.executor import Executor
from autopeft.optimization.study_store import STUDY_FILE
from autopeft.tasks import TextClassification
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.fault_studies import counted_twice, processes_below, records_in, small_search
from tests.learnable import outcomes, tiny_search
from tests.quantized import quiet
from tests.ray_stand_in import HERE, Cluster

ray = pytest.importorskip("ray", reason="needs the extra autopeft[ray]")
pytestmark = [quiet, pytest.mark.slow]


TIMES = {"training_seconds", "examples_per_second"}


@dataclass(frozen=True)
class DyingRunner:
    """A runner whose process is killed, by trial 1 once, by trial 2 every time; trial 7 raises an error."""

    folder: Path

    @property
    def evaluator(self) -> Any:
        device = torch.device("cpu")
        return SimpleNamespace(device=device, compute=HERE, backbone=SimpleNamespace(devices=(device,)))

    @property
    def checkpoints(self) -> AdapterCheckpoints:
        return AdapterCheckpoints(self.folder)

    def untrained(self, job: Job) -> None:
        """Nothing inherits."""

    def run(self, job: Job) -> TrialRecord:
        assert isinstance(job, New | Duplicate)
        if isinstance(job, Duplicate):
            return replace(job.original, number=job.number)
        tries = self.folder / f"{job.number}.{os.getpid()}"
        tries.touch()
        attempts = len(list(self.folder.glob(f"{job.number}.*")))
        if job.number == 2 or (job.number == 1 and attempts == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if job.number == 7:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with more.")
        evaluation = Evaluation(
            configuration=job.configuration, status="complete", values={"process": float(os.getpid())}
        )
        return TrialRecord(number=job.number, evaluation=evaluation)

    def failed(self, job: New, reason: str) -> TrialRecord:
        evaluation = Evaluation(configuration=job.configuration, status="failed", reason=reason)
        return TrialRecord(number=job.number, evaluation=evaluation)


@dataclass(frozen=True)
class NoRunner(DyingRunner):
    """A runner that ends the process which unpacks it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


@pytest.fixture(autouse=True)
def _without_the_variables_that_ray_sets() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of a cluster that is gone, and is not asked for
    runner: Any = DyingRunner(tmp_path)
    executor = RayExecutor(workers=2)(runner)
    yield executor
    executor.close()


def next_record(executor: Executor) -> TrialRecord:
    """Return the next record; workers that come in between get no job."""
    while (record := executor.wait()) is None:
        pass
    return record


def test_a_job_of_a_dead_worker_is_run_again_and_one_that_kills_two_fails(dying: Executor) -> None:
    assert dying.free == 2
    jobs = [New(number=number, configuration=Configuration()) for number in range(6)]
    found: dict[int, TrialRecord] = {}
    while len(found) < 6:
        while jobs and dying.free:
            dying.submit(jobs.pop(0))
        record = next_record(dying)
        assert record.number not in found
        found[record.number] = record
    statuses = {number: record.evaluation.status for number, record in found.items()}
    assert statuses == {
        0: "complete",
        1: "complete",
        2: "failed",
        3: "complete",
        4: "complete",
        5: "complete",
    }
    assert "2 workers died of it" in str(found[2].evaluation.reason)
    assert len({found[number].evaluation.values["process"] for number in (0, 1, 3, 4, 5)}) >= 2
    assert dying.free >= 1  # another may still be starting
    dying.submit(Duplicate(number=6, original=found[0]))
    assert dying.free == 0
    assert next_record(dying).number == 6


def test_a_job_that_raises_in_two_workers_fails_and_the_search_goes_on(dying: Executor) -> None:
    for number in (7, 0):
        dying.submit(New(number=number, configuration=Configuration()))
    found = {record.number: record.evaluation for record in (next_record(dying), next_record(dying))}
    assert found[0].status == "complete"
    reason = "2 workers died of it: AcceleratorError: CUDA error: unspecified launch failure"
    assert (found[7].status, found[7].reason) == ("failed", reason)


def test_while_a_worker_is_replaced_the_others_go_on_also_with_its_job(dying: Executor) -> None:
    for number in (0, 1):
        dying.submit(New(number=number, configuration=Configuration()))
    found = {record.number: record for record in (next_record(dying), next_record(dying))}
    assert {record.evaluation.status for record in found.values()} == {"complete"}
    processes = {record.evaluation.values["process"] for record in found.values()}
    assert len(processes) == 1  # a new worker takes seconds to start


def test_workers_that_died_while_they_were_idle_are_not_the_next_jobs_fault(dying: Executor) -> None:
    for number in (3, 4):
        dying.submit(New(number=number, configuration=Configuration()))
    for record in (next_record(dying), next_record(dying)):
        os.kill(int(record.evaluation.values["process"]), signal.SIGKILL)
    dying.submit(New(number=5, configuration=Configuration()))
    assert next_record(dying).evaluation.status == "complete"


def test_without_a_number_there_are_as_many_workers_as_there_is_room_for(tmp_path: Path) -> None:
    runner: Any = DyingRunner(tmp_path)
    with closing(RayExecutor(cpus_per_worker=os.cpu_count() or 1)(runner)) as executor:
        assert executor.free == 1


def test_where_no_worker_starts_the_error_says_so(tmp_path: Path) -> None:
    runner: Any = NoRunner(tmp_path)
    with pytest.raises(ValueError, match="A worker could not be started"):
        RayExecutor(workers=1)(runner)


def test_a_worker_that_a_cluster_has_no_room_for(tmp_path: Path) -> None:
    runner: Any = DyingRunner(tmp_path)
    with pytest.raises(
        ValueError, match=r"A worker takes 1 CPU and 64 GPU, which no node has: they have 2 CPU and \d GPU"
    ):
        RayExecutor(workers=2, gpus_per_worker=64)(runner)


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    runner: Any = DyingRunner(tmp_path)
    with pytest.raises(ValueError, match=r"No Ray cluster was found at '127.0.0.1:1'"):
        RayExecutor(workers=1, address="127.0.0.1:1")(runner)


@pytest.mark.parametrize(
    ("name", "value"), [("workers", 0), ("cpus_per_worker", 0), ("gpus_per_worker", -1.0)]
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}|cores"):
        RayExecutor(**{"workers": 1, name: value})  # type: ignore[arg-type]


def test_the_errors_that_a_job_is_run_again_for_are_named_as_on_the_stand_in() -> None:
    for name in vars(Cluster.exceptions):
        assert issubclass(getattr(ray.exceptions, name), ray.exceptions.RayError)
    assert issubclass(ray.exceptions.OwnerDiedError, ray.exceptions.ObjectLostError)
    assert issubclass(ray.exceptions.ActorUnavailableError, ray.exceptions.RayActorError)
    assert ray.exceptions.RayActorError(preempted=True).preempted


def search(folder: Path, minilm: Path, questions: Path, executor: Any, **settings: Any) -> Search:
    task = TextClassification(
        str(questions), train_examples=64, validation_examples=40, test_examples=40, max_length=32
    )
    training = Training(epochs=1, batch_size=16, device="cpu")
    arguments = {"sampler": "random", "halving": None, "seeds": 1, "training": training, **settings}
    return Search(minilm, task, executor=executor, folder=folder, tracking=None, **arguments)


def test_a_trial_is_the_same_on_every_worker_and_in_this_process(
    tmp_path: Path, minilm_folder: Path, questions_csv: Path
) -> None:
    local = search(tmp_path / "local", minilm_folder, questions_csv, "local")
    local.run(trials=6, progress=False)
    shared = search(tmp_path / "ray", minilm_folder, questions_csv, RayExecutor(workers=2))
    shared.run(trials=4, progress=False)
    # It goes on in this process: workers do not tell one search from another.
    search(tmp_path / "ray", minilm_folder, questions_csv, "local").run(trials=6, progress=False)

    def found(folder: str) -> dict[int, Any]:
        front = search(tmp_path / folder, minilm_folder, questions_csv, "local").front()
        evaluations = {record.number: record.evaluation for record in front.records}
        return {
            number: (each.configuration, {name: each.values[name] for name in each.values.keys() - TIMES})
            for number, each in evaluations.items()
        }

    assert found("local") == found("ray")


def test_workers_train_what_trials_inherit_once_and_share_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "warm_start": True,
        "baselines": False,
        "sampler": "random",
        "seeds": 2,
        "score_check": False,
    }
    local = tiny_search(tmp_path / "local", **settings)
    shared = tiny_search(tmp_path / "ray", executor=RayExecutor(workers=2), **settings)
    records = [search.run(trials=6, progress=False).records for search in (local, shared)]
    # Which members are trained again, of those that come and go, depends on the order in which trials finish.
    first, second = ({each.number: each.evaluation.each_training() for each in found} for found in records)
    for number, trainings in first.items():
        for seed in trainings.keys() & second[number].keys():
            assert trainings[seed]["accuracy"] == second[number][seed]["accuracy"]
    assert all(each.evaluation.warm_start for found in records for each in found)
    files = [
        sorted(path.name for path in (search.folder / "warm_starts").iterdir()) for search in (local, shared)
    ]
    assert files[0] == files[1] == ["largest-0.safetensors", "largest-1.safetensors"]


class NotesProcess(Callback):
    """Leaves a file with the id of the process that trains."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, *_: Any) -> None:
        (self.folder / str(os.getpid())).touch()


def test_rungs_and_replicates_go_to_any_worker(
    tmp_path: Path, minilm_folder: Path, questions_csv: Path
) -> None:
    processes = tmp_path / "processes"
    processes.mkdir()
    settings: dict[str, Any] = {
        "halving": SuccessiveHalving(rungs=(0.5,), reduction_factor=2),
        "seeds": 2,
        "sampler": "ehvi",
        "training": Training(epochs=1, batch_size=16, device="cpu", callbacks=[NotesProcess(processes)]),
    }
    told: list[TrialRecord] = []
    executor = RayExecutor(workers=2)
    run = search(tmp_path, minilm_folder, questions_csv, executor, **settings)
    front = run.run(trials=8, progress=False, callbacks=[lambda record, _: told.append(record)])
    assert len(front.records) == 8
    assert {record.evaluation.status for record in front.records} <= {"complete", "paused"}
    paused = {record.number for record in told if record.evaluation.status == "paused"}
    complete = {record.number for record in told if record.evaluation.status == "complete"}
    assert paused & complete, "none was promoted"
    assert {record.evaluation.trainings for record in front.records} == {1, 2}
    assert len({*processes.iterdir()} - {processes / str(os.getpid())}) == 2
    point = front.best()
    assert "fresh process" in point.export(tmp_path / "adapter").checked


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_search_whose_workers_are_killed_loses_nothing(
    how: signal.Signals, tmp_path: Path, minilm_folder: Path, questions_csv: Path
) -> None:
    from benchmarks.worker_faults import is_worker  # it imports Ray

    finished: list[int] = []
    killed: list[int] = []

    def kill_one(record: TrialRecord, front: Any) -> None:
        finished.append(record.number)
        if len(finished) in (1, 4):  # the trial that lost its worker is done by the second time
            killed.append(next(filter(is_worker, processes_below(os.getpid()))))
            os.kill(killed[-1], how)

    run = search(tmp_path, minilm_folder, questions_csv, RayExecutor(workers=2))
    front = run.run(trials=6, progress=False, callbacks=[kill_one])
    assert len(killed) == 2
    assert [record.number for record in sorted(front.records, key=lambda each: each.number)] == list(range(6))
    assert all(record.evaluation.status == "complete" for record in front.records)


DRIVER = """
import sys
from pathlib import Path
from autopeft import RayExecutor
from benchmarks.fault_studies import small_search

small_search(Path(sys.argv[1]), 0, executor=RayExecutor(workers=2)).run(trials=40, progress=False)
"""


def test_a_search_whose_driver_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed = small_search(tmp_path / "killed", 0, executor=RayExecutor(workers=2))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "killed")])
    journal = killed.folder / STUDY_FILE
    try:
        while not journal.exists() or journal.read_bytes().count(b"autopeft:record") < 5:
            assert driver.poll() is None
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    assert 0 < len(records_in(killed.folder)) < 40
    front = killed.run(trials=40, progress=False)
    whole = small_search(tmp_path / "whole", 0).run(trials=40, progress=False)
    in_order = [sorted(each.records, key=lambda record: record.number) for each in (front, whole)]
    assert outcomes(in_order[0]) == outcomes(in_order[1])
    assert front.members == whole.members
    assert counted_twice(killed.folder) == 0
