"""A thread that writes what it is handed, some of it later, and tries again what fails."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from autopeft.core.profiling import TimeSpan

_logger = logging.getLogger(__name__)
_ATTEMPTS = 4
_PATIENCE_SECONDS = 60.0
Entry = Callable[[], None]


class BackgroundWriter:
    """Calls entries one after the other in a thread of its own; one that fails is called four times.

    What still fails then is logged once and counted. An entry may itself say what is to be called later, or
    before the others.

    Attributes:
        failures: Entries that could not be written.
        worked: The thread's time.
        ending: Set once there is nothing to come but the last entries.
    """

    def __init__(self) -> None:
        self.failures = 0
        self.worked = TimeSpan()
        self.ending = threading.Event()
        self._queue: queue.Queue[Entry | None] = queue.Queue()
        self._first: deque[Entry] = deque()
        self._later: dict[str, tuple[float, Entry]] = {}
        self._last_success = time.monotonic()
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Begin with what was put so far."""
        self._thread = threading.Thread(target=self._work, name="autopeft-tracker", daemon=True)
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Hand over an entry."""
        self._queue.put(entry)

    def flush(self, patience_seconds: float = math.inf) -> None:
        """Wait until everything put so far is written, or the patience is over."""
        done = threading.Event()
        self.put(done.set)
        end = time.monotonic() + patience_seconds
        while self.is_alive and not done.wait(0.1):
            if time.monotonic() > end:
                return

    def finish(self, last: Sequence[Entry]) -> None:
        """Write what was put, then these, and end; give up once nothing has succeeded for a minute."""
        self._last_success = time.monotonic()
        self.ending.set()
        for entry in last:
            self.put(entry)
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()

    def put_first(self, entries: Sequence[Entry]) -> None:
        """Call these before what waits or is delayed; for entries to say."""
        self._first.extend(entries)

    def delay(self, name: str, until: float, entry: Entry) -> None:
        """Call an entry from a moment of the monotonic clock on, unless it is dropped; for entries to say."""
        self._later[name] = until, entry

    def drop(self, name: str) -> None:
        """Do not call what was delayed under a name; for entries to say."""
        self._later.pop(name, None)

    def call_now(self, name: str) -> None:
        """Call what was delayed under a name, if there is something; for entries to say."""
        if name in self._later:
            self._later[name][1]()
            self.drop(name)  # only now: where it fails, it is called again

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            if self._is_hopeless():
                self.failures += 1
                continue
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    with self.worked.running():
                        entry()
                    self._last_success = time.monotonic()
                    break
                except Exception:
                    if attempt == _ATTEMPTS or self._is_hopeless():
                        self._count_failure()
                        break
                    time.sleep(0.5 * attempt)  # SQLite is locked while another search writes

    def _next(self) -> Entry | None:
        """Return what is to be called next: what is due before what was put."""
        if self._first:
            return self._first.popleft()
        if not self._later:
            return self._queue.get()
        name = min(self._later, key=lambda one: self._later[one][0])
        until, entry = self._later[name]
        seconds = until - time.monotonic()
        if seconds > 0:
            try:
                return self._queue.get(timeout=seconds)
            except queue.Empty:
                pass
        self.drop(name)
        return entry

    def _is_hopeless(self) -> bool:
        return self.ending.is_set() and time.monotonic() - self._last_success > _PATIENCE_SECONDS

    def _count_failure(self) -> None:
        self.failures += 1
        if self.failures == 1:
            _logger.warning("An entry could not be written to MLflow; more are counted.", exc_info=True)
