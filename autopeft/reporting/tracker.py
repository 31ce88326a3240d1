"""What records a search while it runs: MLflow's tracker, or one of a user's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.profiling import TimeSpan
from autopeft.reporting.front import ParetoFront

SettingGroups = Mapping[str, Mapping[str, str]]
"""Settings as text, by group and name."""


class Tracker:
    """Hooks that a search calls from its own thread; each does nothing until a class overrides it.

    What a hook raises is raised by `Search.run`; the study keeps what is done.

    Attributes:
        worked: Time of a thread that the tracker has; None without one.
    """

    worked: TimeSpan | None = None

    @property
    def is_front_due(self) -> bool:
        """Whether `publish_front` is to be called after a trial; it always is at the end."""
        return True

    def start(
        self,
        *,
        note: str,
        identity: SettingGroups,
        records: Sequence[TrialRecord],
        members: Collection[int] = (),
    ) -> None:
        """Begin, or go on.

        Args:
            note: The search in a few lines.
            identity: Its settings and the environment.
            records: Trials of earlier calls.
            members: Numbers of those on the front.
        """

    def trial_started(self, number: int, configuration: Configuration) -> None:
        """Show a trial as running."""

    def trial_finished(self, record: TrialRecord) -> None:
        """Write a trial: when it has finished, each time it pauses at a rung or was trained again."""

    def front_changed(self, members: Collection[int]) -> None:
        """Take note of the trials that are on the front, of which the next to be written may be one."""

    def knee_changed(self, number: int) -> None:
        """Take note of the trial that is the front's knee; see `autopeft.ParetoFront.knee`."""

    def progress(self, metrics: Mapping[str, float], step: int) -> None:
        """Write figures of the whole search, as hypervolume and cost, after so many evaluations."""

    def publish_front(self, front: ParetoFront) -> None:
        """Write the front, of which `records` are all trials and the points derived from them."""

    def log_report(self, save: Callable[[Path], object], place: str) -> None:
        """Write the files that `save` puts into a folder, under a name."""

    def flush(self) -> None:
        """Wait until everything so far is written."""

    def finish(self, status: str, records: Sequence[TrialRecord] = ()) -> None:
        """End with "FINISHED", "KILLED" by Ctrl-C, or "FAILED"."""

    def links(self) -> Sequence[str]:
        """Return lines that say where the search is shown."""
        return ()


TrackerFactory = Callable[..., Tracker]
"""Makes the tracker of a call of `Search.run`, as a class whose `__init__` takes these keywords.

`search_name`, which other searches may have too; `study_id`, a random id that is kept with the study; and
`objectives`, the search's.
"""
