"""Where and how jobs run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Job
from autopeft.evaluation.trial_runner import TrialRunner


class Executor(Protocol):
    """Runs jobs; jobs and records are plain data, so that workers may be other processes.

    Guarantees: every submitted job gives one record, in any order, and a failure is a record too; what a
    training leaves (trained tensors, the checkpoint of a pause) is on disk before its record is returned.
    """

    @property
    def serves_hidden_states(self) -> bool:
        """Whether new trials are trained on hidden states from disk, in place of running frozen blocks."""

    @property
    def at_once(self) -> int:
        """Number of trainings that run at the same time, at least 1: so many share the hours left."""

    @property
    def free(self) -> int:
        """Number of jobs that may be submitted now; 0 while records of finished jobs are to be taken.

        At least 1 where it has no job: a search ends when none can be submitted and none runs.
        """

    def submit(self, job: Job) -> None:
        """Take a job; return at once."""

    def wait(self) -> TrialRecord | None:
        """Return the record of a job that has finished, or None where another job may be submitted first.

        Blocks until there is either.

        Raises:
            KeyboardInterrupt: The user interrupted; jobs that have not finished leave no record.
        """

    def close(self) -> None:
        """Stop the workers; jobs that have not finished leave no record."""


ExecutorFactory = Callable[[TrialRunner], Executor]
"""Makes an executor from what runs a job in this process.

Where its attribute `alters_trials` is False, a search that was begun with another executor may go on with it.
Where `trains_here` is False, GPU-seconds may be a budget although this process has no GPU.
"""


class LocalExecutor:
    """Runs one job at a time in this process, when it is waited for."""

    serves_hidden_states = True
    at_once = 1

    def __init__(self, runner: TrialRunner) -> None:
        self._runner = runner
        self._jobs: deque[Job] = deque()

    @property
    def free(self) -> int:
        """One job may wait."""
        return 1 - len(self._jobs)

    def submit(self, job: Job) -> None:
        """Take a job."""
        self._jobs.append(job)

    def wait(self) -> TrialRecord:
        """Run the job, and return its record."""
        return self._runner.run(self._jobs.popleft())

    def close(self) -> None:
        """Drop a job that was not begun."""
        self._jobs.clear()
