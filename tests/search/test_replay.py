"""Several jobs at once: the order in which they end is on disk, and the same order gives the same study."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileBackend

from autopeft import Search, SuccessiveHalving
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Job
from autopeft.evaluation.trial_runner import TrialRunner
from tests.learnable import outcomes, run, tiny_search

TRIALS = 9


@dataclass
class InOrder:
    """An executor of three jobs at once that end by chance, or in the order of their numbers given."""

    runner: TrialRunner
    order: Iterator[int]
    serves_hidden_states: bool = False
    at_once: int = 3
    jobs: dict[int, Job] = field(default_factory=dict)
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def free(self) -> int:
        return 3 - len(self.jobs)

    def submit(self, job: Job) -> None:
        self.jobs[job.number] = job

    def wait(self) -> TrialRecord:
        number = next(self.order, None)
        if number is None:
            number = self.draw.choice(sorted(self.jobs))
        return self.runner.run(self.jobs.pop(number))

    def close(self) -> None:
        self.jobs.clear()


def searched(folder: Path, order: Iterable[int] = ()) -> Search:
    """Search with rungs, several seeds and derived points."""
    search = tiny_search(
        folder,
        sampler="ehvi",
        seeds=2,
        halving=SuccessiveHalving(rungs=(1 / 3,)),
        executor=lambda runner: InOrder(runner, iter(order)),
    )
    run(search, TRIALS)
    return search


def order_on_disk(search: Search) -> list[int]:
    """Return the number of every record that was written, in the order of the file."""
    lines = JournalFileBackend(str(search.folder / "study.log")).read_logs(0)
    attributes = [{**line.get("user_attrs", {}), **line.get("user_attr", {})} for line in lines]
    records = [
        text for each in attributes for name, text in each.items() if name.startswith("autopeft:record")
    ]
    return [json.loads(text)["number"] for text in records]


@pytest.mark.slow
def test_a_replay_of_the_order_on_disk_gives_the_same_study(tmp_path: Path) -> None:
    first = searched(tmp_path / "first")
    order = order_on_disk(first)
    records = first.front().records
    assert len(order) > TRIALS, "trials were promoted, or trained again"
    assert order != sorted(order)
    replayed = searched(tmp_path / "replayed", order)
    assert order_on_disk(replayed) == order
    assert outcomes(replayed.front().records) == outcomes(records)
