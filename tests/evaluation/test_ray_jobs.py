"""What a RayExecutor makes of jobs whose workers are gone, and which jobs wait: on a stand-in for Ray."""

from __future__ import annotations

from itertools import repeat

import pytest

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.jobs import Replicate, Resume
from tests.ray_stand_in import (
    START_SECONDS,
    Cluster,
    OutOfReachError,
    PreemptedError,
    RecordLostError,
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
