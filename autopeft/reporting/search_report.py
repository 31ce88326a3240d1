"""What a user sees of a search: lines and a bar on the terminal, and runs in MLflow."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New
from autopeft.core.objectives import COST_OBJECTIVES
from autopeft.core.profiling import section
from autopeft.reporting.console import SearchProgress, trial_line
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.mlflow.tracking_uri import redact
from autopeft.reporting.search_profile import record_profile

if TYPE_CHECKING:
    from autopeft.reporting.mlflow.tracker import Tracker

RunEnd = Literal["FINISHED", "KILLED", "FAILED"]


class SearchReport:
    """Listens to the jobs and records of a search, and shows them.

    Args:
        spent: Returns the share of the budget that is spent, and the compute.
        evaluations: Evaluations of earlier calls.
        progress: Whether to print.
        tracker: Writes to MLflow; None for nothing there.
        tracking: URI of the tracking store.

    Attributes:
        progress: The terminal, for further lines and tables; a context in which the bar is shown.
    """

    def __init__(
        self,
        spent: Callable[[], tuple[float, Cost]],
        *,
        evaluations: int = 0,
        progress: bool = True,
        tracker: Tracker | None = None,
        tracking: str | None = None,
    ) -> None:
        self.tracker = tracker
        self.evaluations = evaluations
        self.progress = SearchProgress(enabled=progress)
        self._spent = spent
        self._tracking = tracking
        self._started = time.monotonic()
        self._share_at_start, _ = spent()
        self._says_memory = True

    def begin(
        self, front: ParetoFront, *, description: str, identity: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Say what is searched, and open the search's run in MLflow.

        Args:
            front: The front of earlier calls.
            description: What is searched for and how.
            identity: Groups of settings.
        """
        if self.tracker is not None:
            self.tracker.start(
                note=description, identity=identity, records=front.records, members=front.members
            )
        self.progress.say(description)
        if front.records:
            self.progress.say(_resuming(front.records))
        self.say_link()
        self._update(front)

    def started(self, job: Job) -> None:
        """Show a trial as running."""
        if isinstance(job, Duplicate):
            return
        configuration = job.configuration if isinstance(job, New) else job.record.evaluation.configuration
        self.progress.running(job.number)
        if self.tracker is not None:
            self.tracker.trial_started(job.number, configuration)

    def finished(self, record: TrialRecord, front: ParetoFront) -> None:
        """Show what became of a trial."""
        self.evaluations += 1
        on_front = record.number in front.members
        self.progress.say(trial_line(record, front.objectives, on_front=on_front))
        is_counted = any(objective.name == "peak_memory" for objective in front.objectives)
        if self._says_memory and is_counted and record.evaluation.cost.steps:
            self._says_memory = False
            self.progress.say(_resident_memory())
        self._update(front)
        self._track(record, front)

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
        self.tracker.front_changed(front.members)
        self.tracker.trial_finished(record)
        _, cost = self._spent()
        figures = {f"cost/{name}": float(value) for name, value in asdict(cost).items()}
        figures |= {"hypervolume": front.hypervolume, "front_size": float(len(front))}
        self.tracker.progress(figures, step=self.evaluations - 1)
        if self.tracker.is_front_due:
            self.tracker.publish_front(front.records, front.members)

    def end(self, status: RunEnd, front: ParetoFront, folder: Path, trainings: int) -> None:
        """Write the front as it came out, say where the time went, and end the search's run in MLflow.

        Args:
            status: How the search ended.
            front: What it found.
            folder: The search's, for the profile of a call that is profiled.
            trainings: Trainings of this call.
        """
        try:
            if self.tracker is not None:
                self.tracker.publish_front(front.records, front.members)
            record_profile(folder, trainings, self.tracker, self.progress)
        finally:
            if self.tracker is not None:
                self.tracker.finish(status, front.records)

    def say_link(self) -> None:
        """Say where MLflow shows the search."""
        if self.tracker is None or self._tracking is None:
            return
        self.progress.say(f"MLflow: {self.tracker.link}")
        if not self._tracking.startswith("http"):
            self.progress.say(f"        (served by: autopeft ui --tracking {redact(self._tracking)})")


def _resuming(records: Sequence[TrialRecord]) -> str:
    """Say what is there of earlier calls."""
    counts = Counter(record.evaluation.status for record in records)
    each = ", ".join(f"{number} {status}" for status, number in counts.items())
    again = ". Failed trials are tried again by run(..., retry_failed=True)" if counts["failed"] else ""
    return f"Resuming with {len(records)} trials: {each}{again}."


def _resident_memory() -> str:
    """Say how much main memory this process has taken at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"This process holds up to {COST_OBJECTIVES['peak_memory'].format(peak)} of main memory; peak_memory "
        "counts the tensors of a training alone, not the libraries, the data and the allocator's reserve."
    )
