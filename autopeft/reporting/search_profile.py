"""Keep a search's profile: in its folder, in MLflow, and on the screen."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from autopeft.core.profiling import SECTIONS, current_profile
from autopeft.reporting.console import SearchProgress

if TYPE_CHECKING:
    from autopeft.reporting.mlflow.tracker import Tracker

PROFILE_FOLDER = "profile"
_PATIENCE_SECONDS = 60.0
_SHORTEST = 0.005


def record_profile(folder: Path, trainings: int, tracker: Tracker | None, progress: SearchProgress) -> None:
    """Say where the time of a call went, where it is profiled; MLflow's thread is waited for."""
    profile = current_profile()
    if profile is None:
        return
    if tracker is not None:
        tracker.flush(_PATIENCE_SECONDS)
    profile.count()
    mlflow = None if tracker is None else tracker.worked
    total = sum(span.seconds for span in profile.spans.values())
    table = Table(title=f"Where {total:.1f} s went: {trainings} trainings", title_justify="left")
    for heading in ("section", "share", "seconds", "ms a training", "processor", "calls", "what"):
        table.add_column(heading, justify="left" if heading in ("section", "what") else "right")
    rows = [
        (name, span, f"{span.seconds / total:.1%}", SECTIONS[name]) for name, span in profile.spans.items()
    ]
    if mlflow is not None:
        rows.append(("MLflow", mlflow, "", "its thread, beside"))
    for name, span, share, what in rows:
        if span.seconds >= _SHORTEST:
            each = f"{1000 * span.seconds / max(1, trainings):.1f}"
            seconds, processor = f"{span.seconds:.2f}", f"{span.processor_seconds:.2f}"
            table.add_row(name, share, seconds, each, processor, str(span.calls), what)
    content = {
        "seconds": total,
        "sections": {name: asdict(span) for name, span in profile.spans.items()},
        "trainings": trainings,
        "mlflow": None if mlflow is None else asdict(mlflow),
    }

    def save(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        screen = io.StringIO()
        Console(width=130, file=screen).print(table)
        (place / "profile.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (place / "profile.txt").write_text(screen.getvalue(), encoding="utf-8")

    save(folder / PROFILE_FOLDER)
    if tracker is not None:
        tracker.log_report(save, PROFILE_FOLDER)
    progress.show(table)
