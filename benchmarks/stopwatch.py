"""Where the time of a search's main thread goes, by part, while it runs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

Places = Sequence[tuple[str, type, str]]
"""(Name of a part, class, name of the method that is the part or belongs to it)."""


class Stopwatch:
    """Add up the time of parts; what a part calls that is a part itself counts there alone.

    Attributes:
        seconds: Processor seconds of the thread, by part.
        wall: Elapsed seconds, by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._last = 0.0, 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time until the end of the block to a part."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def _count(self) -> None:
        now = time.thread_time(), time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now[0] - self._last[0]
            self.wall[self._running[-1]] += now[1] - self._last[1]
        self._last = now

    @contextmanager
    def watching(self, places: Places) -> Iterator[None]:
        """Count the calls of methods to their parts until the end of the block."""
        patches = [
            patch.object(owner, method, self._watched(name, getattr(owner, method)))
            for name, owner, method in places
        ]
        for patcher in patches:
            patcher.start()
        try:
            yield
        finally:
            for patcher in patches:
                patcher.stop()

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return method(*arguments, **options)

        return watched
