"""What a user sees while a search runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.reporting.tables import methods_label

_WIDTH_IN_A_FILE = 140


def wide_console() -> Console:
    """Return a console on standard output, wide enough for tables where that is no terminal."""
    width = None if sys.stdout.isatty() else _WIDTH_IN_A_FILE
    return Console(highlight=False, width=width)


class SearchProgress:
    """Lines and tables, and below them a bar with front size, hypervolume and time left.

    Args:
        enabled: False prints nothing.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._progress = Progress(
            TextColumn("[bold]search"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.description}"),
            TimeElapsedColumn(),
            console=wide_console(),
            disable=not enabled,
        )
        self._task = self._progress.add_task("", total=1.0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.enabled:
            self._progress.console.print(text, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        if self.enabled:
            self._progress.console.print(table)

    def running(self, number: int) -> None:
        """Say which trial was begun last."""
        summary = self._progress.tasks[0].fields.get("summary", "")
        self._progress.update(self._task, description=f"trial {number} · {summary}")

    def update(
        self, share: float, *, front_size: int, hypervolume: float, seconds_left: float | None
    ) -> None:
        """Move the bar.

        Args:
            share: How much of the budget is spent, in [0, 1].
            front_size: Trials on the front.
            hypervolume: On the search's fixed axes.
            seconds_left: Estimate; None where nothing is known yet.
        """
        left = "" if seconds_left is None else f" · {timedelta(seconds=round(seconds_left))} left"
        summary = f"front {front_size} · hypervolume {hypervolume:.4f}{left}"
        self._progress.update(self._task, completed=min(1.0, share), description=summary, summary=summary)


def trial_line(record: TrialRecord, objectives: Sequence[Objective], *, on_front: bool) -> str:
    """Write a finished trial as one line."""
    evaluation = record.evaluation
    what = record.baseline or methods_label(evaluation.configuration)
    if evaluation.status != "complete":
        return f"trial {record.number:>3}    {evaluation.status}: {evaluation.reason}  [{what}]"
    values = "  ".join(f"{objective.name} {evaluation.format(objective)}" for objective in objectives)
    mark = "●" if on_front else " "
    tail = f"{evaluation.cost.wall_seconds:.1f} s"
    if record.duplicate_of is not None:
        tail = f"as trial {record.duplicate_of}"
    if evaluation.trainings > 1:
        tail += f" in {evaluation.trainings} trainings"
    return f"trial {record.number:>3}  {mark} {values}  {tail}  [{what}]"
