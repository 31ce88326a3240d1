"""The thread that writes to MLflow: order, what fails, what hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from autopeft.reporting.mlflow.worker import Worker


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def worker(errors: list[Exception]) -> Iterator[Worker]:
    worker = Worker(errors.append)
    yield worker
    if worker.is_alive():
        worker.stop(20)


def test_jobs_are_done_in_their_order(worker: Worker) -> None:
    done: list[str] = []
    worker.put(partial(done.append, "before its start"))
    worker.start()
    worker.put(partial(done.append, "first"))
    worker.put(partial(done.append, "second"))
    assert worker.flush(20)
    assert done == ["first", "second"]
    worker.put(partial(done.append, "third"))
    assert worker.stop(20)
    assert (done, worker.is_alive()) == (["first", "second", "third"], False)
    assert worker.worked.calls == 3 + 2  # waiting is a job too


def test_a_job_that_fails_stops_no_other(worker: Worker, errors: list[Exception]) -> None:
    done: list[str] = []

    def fails() -> None:
        raise OSError("busy")

    worker.start()
    worker.put(fails)
    worker.put(partial(done.append, "second"))
    assert worker.flush(20)
    assert (done, [str(error) for error in errors]) == (["second"], ["busy"])


def test_jobs_that_all_fail_are_given_up(worker: Worker, errors: list[Exception]) -> None:
    """As those of a server that is gone, each of which MLflow's client tries again for long."""

    def fails() -> None:
        time.sleep(0.3)
        raise OSError("gone")

    worker.start()
    for _ in range(1000):
        worker.put(fails)
    begun = time.monotonic()
    assert not worker.flush(1)
    assert not worker.stop(0)
    assert time.monotonic() - begun < 30
    assert 1 <= len(errors) < 100


def test_a_job_that_hangs_is_given_up_with_what_waits(worker: Worker) -> None:
    released = threading.Event()
    done: list[str] = []
    worker.start()
    worker.put(released.wait)
    worker.put(partial(done.append, "never"))
    begun = time.monotonic()
    assert not worker.stop(0.3)
    worker.put(partial(done.append, "too late"))
    assert not worker.flush(20)
    assert 0.3 <= time.monotonic() - begun < 10
    released.set()
    deadline = time.monotonic() + 20
    while worker.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (worker.is_alive(), done) == (False, [])


def test_a_long_queue_is_waited_for_while_it_moves(worker: Worker) -> None:
    worker.start()
    for _ in range(8):
        worker.put(partial(time.sleep, 0.1))
    assert worker.flush(0.5)


def test_waiting_for_a_thread_that_has_not_begun_or_has_ended_returns_at_once(worker: Worker) -> None:
    assert worker.flush(20)
    worker.start()
    assert worker.stop(20)
    assert worker.flush(20)
