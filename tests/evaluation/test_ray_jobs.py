"""What a RayExecutor makes of jobs whose workers are gone, and which jobs wait: on a stand-in for Ray."""

from __future__ import annotations

import os
import signal
import sys
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.jobs import Replicate, Resume
from autopeft.evaluation.ray_executor import _Worker
from tests.ray_stand_in import (
    START_SECONDS,
    Cluster,
    OutOfReachError,
    PreemptedError,
    RecordLostError,
    TaskError,
    executor_on,
    records_of,
    trial,
)


@pytest.mark.parametrize("error", [RecordLostError(), OutOfReachError(), PreemptedError()])
def test_a_trial_that_is_lost_with_its_host_is_run_again_and_is_not_to_blame(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(repeat(True), iter([*repeat((1.0, error), 5), (60.0, True)]))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(7))
    assert next(records_of(executor)) == 7


def test_a_worker_whose_host_is_gone_is_lost_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's error is that of a process that was killed."""
    nodes = [({"CPU": 8.0}, True)]
    cluster = Cluster(repeat(True), iter([*repeat((1.0, False), 5), (60.0, True)]), nodes_have=nodes)
    executor = executor_on(cluster, monkeypatch)
    nodes[:] = [({"CPU": 8.0}, False)]
    executor.submit(trial(7))
    assert next(records_of(executor)) == 7


def test_a_cluster_that_loses_all_workers_ends_a_trial_or_the_call_where_more_is_known_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(repeat(True), repeat((1.0, RecordLostError("It was lost."))))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(7))
    assert next(records_of(executor)) == "10 workers that had it were lost: It was lost."
    evaluation = Evaluation(configuration=Configuration(), status="paused")
    for job in (
        Resume(record=TrialRecord(number=3, evaluation=evaluation), rung=1),
        Replicate(record=TrialRecord(number=4, evaluation=evaluation), training=1),
    ):
        executor.submit(job)
        with pytest.raises(RuntimeError, match=f"had trial {job.number} were lost .*the same call goes on"):
            next(records_of(executor))


def test_a_job_that_kills_two_workers_is_told_what_of(monkeypatch: pytest.MonkeyPatch) -> None:
    lost_between: list[tuple[float, bool | Exception]] = [
        (1.0, False),
        (1.0, RecordLostError()),
        (1.0, False),
    ]
    executor = executor_on(Cluster(repeat(True), iter(lost_between)), monkeypatch)
    executor.submit(trial(7))
    assert next(records_of(executor)) == "2 workers died of it: It was killed."


def test_what_a_worker_raises_at_runtime_is_its_death_and_not_the_searchs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the error of CUDA that every call raises from then on; the work of the other worker is kept."""
    error = TaskError(RuntimeError("CUDA error: unspecified launch failure\nCompile with more to see more."))
    trials: list[tuple[float, bool | Exception]] = [(5.0, True), (1.0, error), (2.0, True), (1.0, error)]
    cluster = Cluster(repeat(True), iter([*trials, (1.0, error)]))
    executor = executor_on(cluster, monkeypatch)
    for number in (0, 1):
        executor.submit(trial(number))
    finished = records_of(executor)
    assert {next(finished), next(finished)} == {0, 1}
    assert len(cluster.starts) == 3
    assert "CUDA error: unspecified launch failure" in caplog.text
    assert "Where it was raised" in caplog.text
    executor.submit(trial(2))
    assert next(finished) == "2 workers died of it: RuntimeError: CUDA error: unspecified launch failure"


@pytest.mark.parametrize("error", [OSError("The disk is full."), ValueError("No such role.")])
def test_what_every_worker_would_raise_ends_the_search(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executor_on(Cluster(repeat(True), iter([(1.0, TaskError(error))])), monkeypatch)
    executor.submit(trial(0))
    with pytest.raises(TaskError, match=str(error)):
        executor.wait()


def test_a_worker_whose_cuda_context_is_gone_has_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further training would fail in it, as this one did."""
    devices = [torch.device("cpu"), torch.device("cuda", 1)]
    asked: list[torch.device] = []

    def gone(device: torch.device) -> None:
        asked.append(device)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runner = SimpleNamespace(
        run=lambda job: "failed", evaluator=SimpleNamespace(backbone=SimpleNamespace(devices=devices))
    )
    context = SimpleNamespace(get_node_id=lambda: "node")
    ray = SimpleNamespace(get=lambda reference: reference, get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    worker: Any = _Worker(os.getcwd(), [runner], torch.get_num_threads())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        worker.run(trial(0))
    assert asked == devices[1:]
    devices.pop()
    assert worker.run(trial(0)) == "failed"


def test_a_failed_trial_is_told_at_once_and_the_next_waits_for_a_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A search whose last worker is gone would lose the record if no other started."""
    cluster = Cluster(iter([True, False, True, True]), iter([(1.0, False), (1.0, False), (60.0, True)]))
    executor = executor_on(cluster, monkeypatch, workers=1)
    executor.submit(trial(0))
    assert executor.free == 0
    told = executor.wait()
    assert "2 workers died of it" in told
    died = cluster.now
    assert executor.free == 1, "else a search would take it for the end that nothing can begin"
    executor.submit(trial(1))
    assert executor.free == 0
    assert executor.wait() == 1
    assert cluster.now == died + START_SECONDS + 60


def test_what_the_largest_lora_is_trained_for_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = {0: 0, 1: 0, 3: 1}
    cluster = Cluster(repeat(True), iter([(60.0, True), (10.0, True), (20.0, True), (90.0, True)]))
    executor = executor_on(cluster, monkeypatch, untrained, workers=3)
    for number in (0, 1, 2, 3):
        executor.submit(trial(number))
    assert executor.free == 0
    assert executor.at_once == 3
    finished = records_of(executor)
    assert [next(finished), next(finished)] == [2, 3], "the first trains what the next inherits"
    assert executor.free == 1, "trial 1 has a place, and waits"
    untrained.clear()
    assert [next(finished), next(finished)] == [0, 1]
    assert cluster.now == START_SECONDS + 60 + 90
