"""A thread that does jobs one after the other, so that a search does not wait for MLflow."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from autopeft.core.profiling import TimeSpan, now


class Worker(threading.Thread):
    """Does jobs in their order; one that fails is reported to `on_failure`, and stops no other.

    Attributes:
        worked: The thread's time.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        super().__init__(name="autopeft-mlflow", daemon=True)
        self.worked = TimeSpan()
        self._on_failure = on_failure
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._last_success = 0.0
        self._is_given_up = False

    @property
    def takes_jobs(self) -> bool:
        """Whether the thread is started, not ended, and not given up."""
        return self.is_alive() and not self._is_given_up

    def put(self, job: Callable[[], object]) -> None:
        """Have a job done; nothing happens before the thread is started, and after its end."""
        if self.takes_jobs:
            self._jobs.put(job)

    def flush(self, patience_seconds: float) -> bool:
        """Wait until all jobs are done, or none has succeeded for some seconds; say whether all are done."""
        done = threading.Event()
        self.put(done.set)
        self._last_success = time.monotonic()
        while self.takes_jobs and not done.wait(0.1):
            if time.monotonic() - self._last_success > patience_seconds:
                return False
        return not self._is_given_up

    def stop(self, patience_seconds: float) -> bool:
        """Do all jobs and end, or give up what is left; see `flush`."""
        is_done = self.flush(patience_seconds)
        self._is_given_up = not is_done
        self._jobs.put(None)
        if is_done:
            self.join()
        return is_done

    def run(self) -> None:
        """Do the jobs until there is no more."""
        while (job := self._jobs.get()) is not None and not self._is_given_up:
            start = now()
            try:
                job()
                self._last_success = time.monotonic()
            except Exception as error:
                self._on_failure(error)
            self.worked.add_since(start)
            self.worked.calls += 1
