"""When a RayExecutor tries again to start workers, on a stand-in for Ray: time passes where it is waited."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise, repeat
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autopeft import RayExecutor
from autopeft.core.configuration import Configuration
from autopeft.core.jobs import New
from autopeft.evaluation import ray_executor

_START_SECONDS = 3.0


class WorkerDiedError(Exception):
    """Ray's word for a worker that is gone."""


class RecordLostError(Exception):
    """Ray's word for what a worker returned, and was lost with its host."""


@dataclass(eq=False)
class Answer:
    """What a worker returns, and when; None where it has died."""

    due: float
    value: Any


@dataclass(eq=False)
class Cluster:
    """What a RayExecutor calls of Ray.

    Attributes:
        can_start: Of one start after another, whether the worker comes up; None for one without a place.
        trials: How long each trial takes, and whether its worker survives it, or what becomes of its record.
        lives: Of one idle worker after another that is asked whether it lives, whether it does.
        resources: What the nodes have.
        now: The time in seconds.
        starts: When workers were started.
    """

    can_start: Iterator[bool | None]
    trials: Iterator[tuple[float, bool | Exception]]
    lives: Iterator[bool] = field(default_factory=lambda: repeat(True))
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 8.0})
    now: float = 0.0
    starts: list[float] = field(default_factory=list)
    exceptions = SimpleNamespace(
        RayActorError=WorkerDiedError,
        ActorUnschedulableError=WorkerDiedError,
        WorkerCrashedError=WorkerDiedError,
        NodeDiedError=WorkerDiedError,
        OutOfMemoryError=WorkerDiedError,
        ObjectLostError=RecordLostError,
    )

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self.start)

    def start(self, *_: Any) -> Any:
        self.starts.append(self.now)
        is_up = next(self.can_start)
        answers = iter([Answer(math.inf if is_up is None else self.now + _START_SECONDS, is_up or None)])

        def is_ready() -> Answer:
            return next(answers, None) or Answer(self.now, next(self.lives) or None)

        return SimpleNamespace(
            is_ready=SimpleNamespace(remote=is_ready), run=SimpleNamespace(remote=self.run)
        )

    def run(self, job: New) -> Answer:
        seconds, outcome = next(self.trials)
        record = job.number if outcome is True else None
        return Answer(self.now + seconds, outcome if isinstance(outcome, Exception) else record)

    def wait(self, answers: list[Answer], *, num_returns: int, timeout: float | None) -> Any:
        assert num_returns == 1
        first = min(answers, key=lambda answer: answer.due)
        if timeout is not None and self.now + timeout < first.due:
            self.sleep(timeout)
            return [], answers
        self.now = max(self.now, first.due)
        return [first], [answer for answer in answers if answer is not first]

    def get(self, answer: Answer) -> Any:
        if answer.value is None:
            raise WorkerDiedError
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value

    def kill(self, worker: Any) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def executor_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """Return an executor, by default of two workers; of a trial that fails the reason is the record."""
    monkeypatch.setitem(sys.modules, "ray", cluster)
    clock = SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep)
    monkeypatch.setattr(ray_executor, "time", clock, raising=False)
    runner: Any = SimpleNamespace(
        warm_starts=None,
        evaluator=SimpleNamespace(device=torch.device("cpu")),
        failed=lambda job, reason: reason,
    )
    return RayExecutor(**{"workers": 2, **settings})(runner)


def trial(number: int) -> New:
    return New(number=number, configuration=Configuration())


def test_a_search_begins_with_the_workers_that_could_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(chain([True], repeat(False)), repeat((60.0, True)))
    executor = executor_on(cluster, monkeypatch)
    assert executor.free == 1
    assert cluster.now == _START_SECONDS


def test_it_does_not_wait_for_a_worker_for_which_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(iter([True, None]), repeat((60.0, True)))
    executor = executor_on(cluster, monkeypatch)
    assert executor.free == 1
    assert cluster.now < 100
    executor.submit(trial(0))
    assert executor.wait() == 0


def test_while_another_trains_they_are_tried_again_after_longer_and_longer_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = 12
    cluster = Cluster(chain([True], repeat(False, failures), [True]), iter([(1e4, True)]))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(0))
    assert executor.wait() is None  # the other worker has come, which may have a job at once
    assert executor.free == 1
    assert executor.wait() == 0
    assert executor.free == 2
    first, *others = cluster.starts
    assert (first, others[0]) == (0, 0)
    pauses = [later - earlier - _START_SECONDS for earlier, later in pairwise(others)]
    assert pauses == [1, 2, 4, 8, 16, 32, *repeat(64, failures - 6)]


def test_a_lost_trial_waits_for_a_worker_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(
        iter([True, True, False, True, True]), iter([(1.0, False), (2.0, False), *repeat((60.0, True), 2)])
    )
    executor = executor_on(cluster, monkeypatch)
    for number in (0, 1):
        executor.submit(trial(number))
    records = (executor.wait() for _ in repeat(None))
    finished = (record for record in records if record is not None)
    assert {next(finished), next(finished)} == {0, 1}


def test_it_is_an_error_where_no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    never = Cluster(repeat(False), iter([]))
    with pytest.raises(ValueError, match="A worker could not be started"):
        executor_on(never, monkeypatch)
    assert len(never.starts) == 4  # two at once, and two in their place
    cluster = Cluster(chain([True] * 2, repeat(False)), iter([(1.0, False), (500.0, False)]))
    executor = executor_on(cluster, monkeypatch)
    for number in (0, 1):
        executor.submit(trial(number))
    with pytest.raises(ValueError, match="A worker could not be started"):
        executor.wait()
    assert cluster.now > 500


def test_a_trial_whose_record_was_lost_with_its_host_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(repeat(True), iter([(1.0, RecordLostError()), (60.0, True)]))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(7))
    records = (executor.wait() for _ in repeat(None))
    assert next(record for record in records if record is not None) == 7


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
    assert cluster.now == died + _START_SECONDS + 60


def test_workers_that_live_on_do_not_shorten_the_pauses_of_those_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One dies while starts have failed for long, and another that was idle says that it lives."""
    trials = iter([(1.0, False), (1000.0, False), (10.0, True), (1e4, True)])
    cluster = Cluster(chain([True] * 3, repeat(False)), trials)
    executor = executor_on(cluster, monkeypatch, workers=3)
    for number in (0, 1):
        executor.submit(trial(number))
    finished = (record for _ in repeat(None) if (record := executor.wait()) is not None)
    assert [next(finished), next(finished)] == [0, 1]
    died = 1000 + _START_SECONDS
    assert died in cluster.starts
    assert sum(died < start < died + 60 for start in cluster.starts) <= 1, "those that failed before"


def test_an_idle_worker_that_died_with_another_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(repeat(True), iter([(1.0, False), (60.0, True)]), lives=iter([False]))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(0))
    records = (executor.wait() for _ in repeat(None))
    assert next(record for record in records if record is not None) == 0
    assert cluster.starts == [0, 0, 4, 4]
    assert executor.free == 2


def test_a_cluster_may_be_too_small_for_all_workers_but_not_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(iter([True, None, None]), repeat((60.0, True)), resources={"CPU": 8.0, "GPU": 1.0})
    executor = executor_on(cluster, monkeypatch, workers=3, gpus_per_worker=1)
    assert executor.free == 1
    assert "The cluster has room for 1 of 3 workers" in caplog.text
    with pytest.raises(
        ValueError, match="A worker takes 1 CPU and 2 GPU, but the cluster has 8 CPU and 1 GPU"
    ):
        executor_on(cluster, monkeypatch, gpus_per_worker=2)


@pytest.mark.parametrize("gpus", [1.5, -1.0, math.inf, math.nan])
def test_gpus_are_a_whole_number_or_a_share_of_one(gpus: float) -> None:
    with pytest.raises(ValueError, match=f"a whole number of GPUs or a share below 1, got {gpus}"):
        RayExecutor(workers=1, gpus_per_worker=gpus)
