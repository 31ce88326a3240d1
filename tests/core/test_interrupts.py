"""Ctrl-C is a KeyboardInterrupt also where it would be dropped, or leave the process."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from autopeft.core.interrupts import interruptible


class Dropping:
    """Gets Ctrl-C where Python drops it."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_interrupt_is_raised_at_the_blocks_end() -> None:
    steps: list[str] = []

    def train() -> None:
        with interruptible():
            Dropping()
            steps.append("trained")
        steps.append("recorded")

    with pytest.raises(KeyboardInterrupt), interruptible():
        train()
    assert steps == ["trained", "recorded"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_leaving_the_process_is_an_interrupt_after_one_alone() -> None:
    with pytest.raises(SystemExit), interruptible():
        sys.exit(1)

    def leave() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(KeyboardInterrupt), interruptible():
        leave()


def test_a_handler_of_the_callers_stays() -> None:
    seen: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
