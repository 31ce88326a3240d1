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
        trials: How long each trial takes, and whether its worker survives it.
        now: The time in seconds.
        starts: When workers were started.
    """

    can_start: Iterator[bool | None]
    trials: Iterator[tuple[float, bool]]
    now: float = 0.0
    starts: list[float] = field(default_factory=list)
    exceptions = SimpleNamespace(
        RayActorError=WorkerDiedError, NodeDiedError=WorkerDiedError, OutOfMemoryError=WorkerDiedError
    )

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8}

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self.start)

    def start(self, *_: Any) -> Any:
        self.starts.append(self.now)
        is_up = next(self.can_start)
        answer = Answer(math.inf if is_up is None else self.now + _START_SECONDS, is_up or None)
        return SimpleNamespace(
            is_ready=SimpleNamespace(remote=lambda: answer), run=SimpleNamespace(remote=self.run)
        )

    def run(self, job: New) -> Answer:
        seconds, survives = next(self.trials)
        return Answer(self.now + seconds, job.number if survives else None)

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
        return answer.value

    def kill(self, worker: Any) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def executor_on(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return an executor of two workers."""
    monkeypatch.setitem(sys.modules, "ray", cluster)
    clock = SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep)
    monkeypatch.setattr(ray_executor, "time", clock, raising=False)
    runner: Any = SimpleNamespace(
        warm_starts=None, evaluator=SimpleNamespace(device=torch.device("cpu")), failed=None
    )
    return RayExecutor(workers=2)(runner)


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
