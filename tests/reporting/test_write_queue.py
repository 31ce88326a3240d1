"""The thread that writes to MLflow: order, what is delayed, what fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import pytest

from autopeft.reporting.mlflow.write_queue import BackgroundWriter


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def quick_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.reporting.mlflow.write_queue.time.sleep", lambda seconds: None)


def say(said: list[str], *words: str) -> list[Callable[[], None]]:
    return [partial(said.append, word) for word in words]


def run(writer: BackgroundWriter, *entries: Callable[[], None]) -> None:
    for entry in entries:
        writer.put(entry)
    writer.start()
    writer.finish([])


def test_entries_are_called_in_their_order_and_the_last_ones_last(said: list[str]) -> None:
    writer = BackgroundWriter()
    assert not writer.is_alive
    first, second, third = say(said, "first", "second", "third")
    writer.put(first)
    writer.start()
    assert writer.is_alive
    writer.put(second)
    writer.flush()
    assert said == ["first", "second"]
    writer.finish([third])
    assert said == ["first", "second", "third"]
    assert (writer.is_alive, writer.failures, writer.worked.calls) == (False, 0, 4)  # `flush` is one too


def test_what_an_entry_puts_first_comes_before_what_waits(said: list[str]) -> None:
    writer = BackgroundWriter()
    (waiting,) = say(said, "waiting")
    run(writer, partial(writer.put_first, say(said, "urgent", "and this")), waiting)
    assert said == ["urgent", "and this", "waiting"]


def test_what_is_delayed_is_called_when_due_also_while_others_wait(said: list[str]) -> None:
    writer = BackgroundWriter()
    due, much_later, waiting = say(said, "due", "much later", "waiting")
    now = time.monotonic()
    run(
        writer,
        partial(writer.delay, "much later", now + 1000, much_later),
        partial(writer.delay, "due", now, due),
        waiting,
    )
    assert said == ["due", "waiting"]


def test_what_is_delayed_is_called_without_anything_that_waits(said: list[str]) -> None:
    writer = BackgroundWriter()
    (due,) = say(said, "due")
    writer.start()
    writer.put(partial(writer.delay, "due", time.monotonic() + 0.05, due))
    deadline = time.monotonic() + 20
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    writer.finish([])
    assert said == ["due"]


def test_what_is_delayed_can_be_dropped_or_called_now(said: list[str]) -> None:
    writer = BackgroundWriter()
    shown, dropped = say(said, "shown", "dropped")
    later = time.monotonic() + 1000
    run(
        writer,
        partial(writer.delay, "one", later, shown),
        partial(writer.delay, "other", later, dropped),
        partial(writer.call_now, "one"),
        partial(writer.call_now, "one"),
        partial(writer.drop, "other"),
        partial(writer.call_now, "other"),
    )
    assert said == ["shown"]


@pytest.mark.usefixtures("quick_attempts")
def test_an_entry_that_fails_is_called_again_and_given_up_after_four_times(
    said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    writer = BackgroundWriter()

    def fails(times: int) -> None:
        said.append(f"fails {times}")
        if said.count(f"fails {times}") <= times:
            raise OSError("busy")

    with caplog.at_level(logging.WARNING, logger="autopeft"):
        run(writer, *(partial(fails, times) for times in (3, 4, 5)))
    assert [said.count(f"fails {times}") for times in (3, 4, 5)] == [4, 4, 4]
    assert writer.failures == 2
    assert caplog.text.count("Traceback") == 1


@pytest.mark.usefixtures("quick_attempts")
def test_at_the_end_a_store_that_does_not_answer_is_given_up(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.reporting.mlflow.write_queue._PATIENCE_SECONDS", -1.0)
    writer = BackgroundWriter()
    writer.ending.set()
    run(writer, *say(said, "one", "two"))
    assert (said, writer.failures) == ([], 2)
