"""Keep a search's profile: in its folder, in MLflow, and on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autopeft.core.profiling import current_profile
from autopeft.reporting.console import SearchProgress

if TYPE_CHECKING:
    from autopeft.reporting.mlflow.tracker import Tracker

PROFILE_FOLDER = "profile"
_PATIENCE_SECONDS = 60.0


def record_profile(folder: Path, trainings: int, tracker: Tracker | None, progress: SearchProgress) -> None:
    """Say where the time of a call went, where it is profiled; MLflow's thread is waited for."""
    profile = current_profile()
    if profile is None:
        return
    if tracker is not None:
        tracker.flush(_PATIENCE_SECONDS)
    report = profile.report(trainings=trainings, mlflow=None if tracker is None else tracker.worked)
    report.save(folder / PROFILE_FOLDER)
    if tracker is not None:
        tracker.log_report(report.save, PROFILE_FOLDER)
    progress.show(report.table())
