"""Ctrl-C in blocks of code that would lose it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt for every Ctrl-C in a `with` block, at the block's end at the latest.

    Python drops one that falls into a `__del__`, for example. Lightning ignores further SIGINTs and calls
    `sys.exit(1)`; a model that calls `sys.exit` has failed. A caller's own handler of SIGINT stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = False

    def notice(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:
        signal.signal(signal.SIGINT, notice)
    try:
        yield
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from exit_
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
