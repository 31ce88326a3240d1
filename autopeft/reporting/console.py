"""What a user sees while a search runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.tables import TEXT_WIDTH
from autopeft.reporting.formats import methods_label


def wide_console() -> Console:
    """Return a console on standard output, wide enough for tables where that is no terminal."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else TEXT_WIDTH)


class SearchProgress:
    """Lines and tables, and below them a bar with front size, hypervolume and time left, where enabled.

    A notebook without ipywidgets, which rich draws bars with there, has lines and tables alone.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        console = wide_console()
        console.quiet = not enabled
        self._progress = Progress(
            TextColumn("[bold]search"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.description}{task.fields[summary]} ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled or (console.is_jupyter and find_spec("ipywidgets") is None),
            speed_estimate_period=math.inf,
        )
        self._task = self._progress.add_task("", total=1.0, summary="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        self._progress.console.print(table)

    def running(self, number: int) -> None:
        """Say which trial was begun last."""
        self._progress.update(self._task, description=f"trial {number} · ")

    def update(self, share: float, *, front_size: int, hypervolume: float) -> None:
        """Move the bar to the share of the budget that is spent."""
        summary = f"front {front_size} · hypervolume {hypervolume:.4f}"
        self._progress.update(self._task, completed=min(1.0, share), description="", summary=summary)


def trial_line(record: TrialRecord, objectives: Sequence[Objective], *, on_front: bool) -> str:
    """Write a finished trial as one line."""
    evaluation = record.evaluation
    what = record.baseline or methods_label(evaluation.configuration, evaluation.values)
    if evaluation.status != "complete":
        return f"trial {record.number:>3}    {evaluation.status}: {evaluation.reason}  [{what}]"
    values = "  ".join(f"{objective.name} {evaluation.format(objective)}" for objective in objectives)
    mark = "●" if on_front else " "
    tail = f"{evaluation.cost.wall_seconds:.1f} s"
    if record.derived_from is not None:
        tail = f"cut from trial {record.derived_from} in {tail}"
    if record.duplicate_of is not None:
        tail = f"as trial {record.duplicate_of}"
    if evaluation.trainings > 1:
        tail += f" in {evaluation.trainings} trainings"
    return f"trial {record.number:>3}  {mark} {values}  {tail}  [{what}]"
