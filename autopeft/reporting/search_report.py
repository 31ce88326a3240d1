"""What a user sees of a search: lines and a bar on the terminal, and runs in MLflow."""

from __future__ import annotations

import json
import resource
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New
from autopeft.core.objectives import COST_OBJECTIVES
from autopeft.core.profiling import SECTIONS, current_profile, section
from autopeft.core.tables import as_text, titled_table
from autopeft.reporting.console import SearchProgress, trial_line
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.tracker import SettingGroups, Tracker

RunEnd = Literal["FINISHED", "KILLED", "FAILED"]
PROFILE_FOLDER = "profile"
_SHORTEST_SECONDS = 0.005  # in the profile's table
Spending = Callable[[], tuple[float, Cost]]
"""Returns the share of the budget that is spent, and the compute."""


class SearchReport:
    """Listens to the jobs and records of a search, and shows them.

    Args:
        spent: What is spent at the moment.
        evaluations: Evaluations of earlier calls.
        progress: Whether to print; as an attribute the terminal, within which the bar is shown.
        tracker: Records the search elsewhere, as in MLflow.
    """

    def __init__(self, spent: Spending, *, evaluations: int, progress: bool, tracker: Tracker) -> None:
        self.tracker = tracker
        self.evaluations = evaluations
        self.progress = SearchProgress(enabled=progress)
        self._spent = spent
        self._says_memory = True

    def begin(self, front: ParetoFront, *, description: str, identity: SettingGroups) -> None:
        """Say what is searched, and what earlier calls found."""
        self.tracker.start(note=description, identity=identity, records=front.records, members=front.members)
        self._track_knee(front)
        self.progress.say(description)
        if front.records:
            self.progress.say(_resuming(front.records))
        self.say_link()
        share, _ = self._spent()
        self._update(share, front)

    def started(self, job: Job) -> None:
        """Show a trial as running."""
        if isinstance(job, Duplicate):
            return
        configuration = job.configuration if isinstance(job, New) else job.record.evaluation.configuration
        self.progress.running(job.number)
        self.tracker.trial_started(job.number, configuration)

    def finished(self, record: TrialRecord, front: ParetoFront) -> None:
        """Show what became of a trial."""
        self.evaluations += 1
        for point in record.points:
            on_front = point.number in front.members
            self.progress.say(trial_line(point, front.objectives, on_front=on_front))
        is_counted = any(objective.name == "peak_memory" for objective in front.objectives)
        if self._says_memory and is_counted and record.evaluation.cost.steps:
            self._says_memory = False
            self.progress.say(_resident_memory())
        share, cost = self._spent()
        self._update(share, front)
        self._track(record, front, cost)

    @section("other")
    def _update(self, share: float, front: ParetoFront) -> None:
        self.progress.update(share, front_size=len(front), hypervolume=front.hypervolume)

    @section("log")
    def _track(self, record: TrialRecord, front: ParetoFront, cost: Cost) -> None:
        figures = {f"cost/{name}": float(value) for name, value in asdict(cost).items()}
        figures |= {"hypervolume": front.hypervolume, "front_size": float(len(front))}
        self.tracker.progress(figures, step=self.evaluations - 1)
        self.tracker.front_changed(front.members)
        self._track_knee(front)
        for point in record.points:
            self.tracker.trial_finished(point)
        if self.tracker.is_front_due:
            self.tracker.publish_front(front)

    def _track_knee(self, front: ParetoFront) -> None:
        if len(front):
            self.tracker.knee_changed(front.knee().number)

    def end(self, status: RunEnd, front: ParetoFront, folder: Path, trainings: int) -> None:
        """Write the front, and the profile below the search's folder."""
        try:
            self.tracker.publish_front(front)
            self._record_profile(folder / PROFILE_FOLDER, trainings)
        finally:
            self.tracker.finish(status, front.records)

    def _record_profile(self, folder: Path, trainings: int) -> None:
        """Say where the time of the call went: here, in a folder, and by the tracker, which is waited for."""
        if (profile := current_profile.get()) is None:
            return
        self.tracker.flush()
        profile.count()
        tracking = self.tracker.worked
        total = sum(span.seconds for span in profile.spans.values())
        headings = ("section", "share", "seconds", "ms a training", "processor", "calls", "what")
        title = f"Where {total:.1f} s went: {trainings} trainings"
        table = titled_table(title, headings, words=("section", "what"))
        for name, span in {**profile.spans, "tracking": tracking}.items():
            if span is not None and span.seconds >= _SHORTEST_SECONDS:
                table.add_row(
                    name,
                    f"{span.seconds / total:.1%}" if name in SECTIONS else "",
                    f"{span.seconds:.2f}",
                    f"{1000 * span.seconds / max(1, trainings):.1f}",
                    f"{span.processor_seconds:.2f}",
                    str(span.calls),
                    SECTIONS.get(name, "its thread, beside"),
                )
        kept = {"seconds": total, "sections": profile.spans, "trainings": trainings, "tracking": tracking}
        text = json.dumps(kept, indent=1, default=asdict)

        def save(place: Path) -> None:
            place.mkdir(parents=True, exist_ok=True)
            (place / "profile.json").write_text(text + "\n", encoding="utf-8")
            (place / "profile.txt").write_text(as_text(table) + "\n", encoding="utf-8")

        save(folder)
        self.tracker.log_report(save, folder.name)
        self.progress.show(table)

    def say_link(self) -> None:
        """Say where the search is shown."""
        for line in self.tracker.links():
            self.progress.say(line)


def _resuming(records: Sequence[TrialRecord]) -> str:
    records = [record for record in records if record.derived_from is None]
    counts = Counter(record.evaluation.status for record in records)
    each = ", ".join(f"{number} {status}" for status, number in counts.items())
    again = ". Failed trials are tried again by run(..., retry_failed=True)" if counts["failed"] else ""
    return f"Resuming with {len(records)} trials: {each}{again}."


def _resident_memory() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (
        f"This process holds up to {COST_OBJECTIVES['peak_memory'].format(peak)} of main memory; peak_memory "
        "counts the tensors of a training alone, not the libraries, the data and the allocator's reserve."
    )
