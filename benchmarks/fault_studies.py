"""The small search that the benchmarks of faults disturb, and how what is left of it is counted and shown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from autopeft import Search, SuccessiveHalving
from autopeft.core.evaluation import TrialRecord
from autopeft.optimization.study_file import read_journal
from autopeft.optimization.study_store import STUDY_FILE, load_study
from autopeft.reporting.console import wide_console
from tests.learnable import learnable_task, tiny_search

TRIALS = 8
COLUMNS = ("injected", "recovered", "trials lost", "counted twice")


def small_search(folder: Path, seed: int, *, has_rungs: bool = False, **settings: Any) -> Search:
    """Return a search of a tiny random model: with rungs and replicates, or of single whole trainings."""
    return tiny_search(
        folder,
        task=learnable_task(rows=96),
        halving=SuccessiveHalving(rungs=(0.25, 0.5), reduction_factor=2) if has_rungs else None,
        seeds=2 if has_rungs else 1,
        seed=seed,
        sampler="random",
        name="faults",
        **settings,
    )


def records_in(folder: Path) -> list[TrialRecord]:
    """Return what a search's folder has of its trials."""
    if not (folder / STUDY_FILE).exists():
        return []
    try:
        return load_study(folder)[1]
    except ValueError as error:
        if "is empty" in str(error):  # killed before the study was made
            return []
        raise


def counted_twice(folder: Path) -> int:
    """Return how many trials stand in the journal more than once."""
    journal = folder / STUDY_FILE
    if not journal.exists():
        return 0
    storage = read_journal(journal)
    names = [study.study_name for study in storage.get_all_studies()]
    trials = [
        trial
        for study_id in map(storage.get_study_id_from_name, names)
        for trial in storage.get_all_trials(study_id)
    ]
    numbers = Counter(json.loads(trial.user_attrs["autopeft:record"])["number"] for trial in trials)
    return sum(count - 1 for count in numbers.values())


def processes_below(process: int) -> Iterator[int]:
    """Yield a process and those that descend from it."""
    yield process
    with suppress(OSError):  # it has ended
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from processes_below(int(child))


def show(title: str, rows: Mapping[str, Mapping[str, int]], columns: tuple[str, ...] = COLUMNS) -> None:
    """Print a row a kind of fault."""
    table = Table(title=title)
    for heading in ("fault", *columns):
        table.add_column(heading, justify="left" if heading == "fault" else "right")
    for kind, counts in rows.items():
        table.add_row(kind, *(str(counts[column]) for column in columns))
    wide_console().print(table)
