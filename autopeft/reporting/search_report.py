"""What a user sees of a search: lines and a bar on the terminal, and runs in MLflow."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from rich.table import Table

from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New
from autopeft.core.objectives import COST_OBJECTIVES, Objective
from autopeft.core.profiling import section
from autopeft.reporting.console import SearchProgress
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.mlflow.tracking_uri import redact

if TYPE_CHECKING:
    from autopeft.reporting.mlflow.tracker import Tracker

RunEnd = Literal["FINISHED", "KILLED", "FAILED"]


class SearchReport:
    """Listens to the jobs and records of a search, and shows them.

    Args:
        objectives: The search's.
        spent: Returns the share of the budget that is spent, and the compute.
        evaluations: Evaluations of earlier calls.
        progress: Whether to print.
        tracker: Writes to MLflow; None for nothing there.
        tracking: URI of the tracking store.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        spent: Callable[[], tuple[float, Cost]],
        *,
        evaluations: int = 0,
        progress: bool = True,
        tracker: Tracker | None = None,
        tracking: str | None = None,
    ) -> None:
        self.tracker = tracker
        self.evaluations = evaluations
        self.progress = SearchProgress(objectives, enabled=progress)
        self._spent = spent
        self._tracking = tracking
        self._started = time.monotonic()
        self._share_at_start, _ = spent()
        self._members: frozenset[int] = frozenset()
        self._says_memory = any(objective.name == "peak_memory" for objective in objectives)

    def __enter__(self) -> Self:
        self.progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.progress.__exit__(kind, error, traceback)

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def show(self, table: Table) -> None:
        """Print a table."""
        self.progress.show(table)

    def begin(
        self,
        front: ParetoFront,
        *,
        description: str,
        identity: Mapping[str, Mapping[str, str]],
    ) -> None:
        """Say what is searched, and open the search's run in MLflow.

        Args:
            front: The front of earlier calls.
            description: What is searched for and how.
            identity: Groups of settings.
        """
        self._members = front.members
        if self.tracker is not None:
            self.tracker.start(
                note=description, identity=identity, records=front.records, members=front.members
            )
        self.say(description)
        if front.records:
            self.say(resuming(front.records))
        self.say_link()
        self._update(front)

    def started(self, job: Job) -> None:
        """Show a trial as running."""
        if isinstance(job, Duplicate):
            return
        configuration = job.configuration if isinstance(job, New) else job.record.evaluation.configuration
        self.progress.running(job.number)
        if self.tracker is not None:
            self.tracker.trials_started({job.number: configuration})

    def finished(self, record: TrialRecord, front: ParetoFront) -> None:
        """Show what became of a trial."""
        self.evaluations += 1
        self.progress.finished(record, on_front=record.number in front.members)
        if self._says_memory and record.evaluation.cost.steps:
            self._says_memory = False
            self.say(resident_memory())
        self._update(front)
        self._track(record, front)
        self._members = front.members

    @section("other")
    def _update(self, front: ParetoFront) -> None:
        share, _ = self._spent()
        progressed = share - self._share_at_start
        elapsed = time.monotonic() - self._started
        self.progress.update(
            share,
            front_size=len(front),
            hypervolume=front.hypervolume,
            seconds_left=elapsed / progressed * max(0.0, 1 - share) if progressed > 0 else None,
        )

    @section("log")
    def _track(self, record: TrialRecord, front: ParetoFront) -> None:
        if self.tracker is None:
            return
        if front.members != self._members:
            self.tracker.front_changed(front.members)
        self.tracker.trial_finished(record)
        _, cost = self._spent()
        self.tracker.progress(
            {
                "hypervolume": front.hypervolume,
                "front_size": float(len(front)),
                "cost/wall_seconds": cost.wall_seconds,
                "cost/cpu_seconds": cost.cpu_seconds,
                "cost/gpu_seconds": cost.gpu_seconds,
                "cost/steps": float(cost.steps),
            },
            step=self.evaluations - 1,
        )
        if self.tracker.is_front_due:
            self.publish(front)

    def publish(self, front: ParetoFront) -> None:
        """Write the front's page and table to MLflow."""
        if self.tracker is not None:
            self.tracker.publish_front(front.records, front.members)

    def end(self, status: RunEnd, front: ParetoFront) -> None:
        """End the search's run in MLflow."""
        if self.tracker is not None:
            self.tracker.finish(status, front.records)

    def say_link(self) -> None:
        """Say where MLflow shows the search."""
        if self.tracker is None or self._tracking is None:
            return
        self.say(f"MLflow: {self.tracker.link}")
        if not self._tracking.startswith("http"):
            self.say(f"        (served by: autopeft ui --tracking {redact(self._tracking)})")


def resuming(records: Sequence[TrialRecord]) -> str:
    """Say what is there of earlier calls."""
    counts = Counter(record.evaluation.status for record in records)
    text = f"Resuming with {len(records)} trials: " + ", ".join(
        f"{number} {status}" for status, number in counts.items()
    )
    if counts["failed"]:
        text += ". Failed trials are tried again by run(..., retry_failed=True)"
    return f"{text}."


def resident_memory() -> str:
    """Say how much main memory this process has taken at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"This process holds up to {COST_OBJECTIVES['peak_memory'].format(peak)} of main memory; peak_memory "
        "counts the tensors of a training alone, not the libraries, the data and the allocator's reserve."
    )
