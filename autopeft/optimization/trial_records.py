"""The trials of a search, and what is asked of all of them before each new one."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Self, overload

from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import front_records

_number = attrgetter("number")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the trials of a search have used up."""

    trials: int = 0  # trials that a budget counts: all but the infeasible ones
    cost: Cost = field(default_factory=Cost)  # what all evaluations cost; a duplicate cost nothing

    @classmethod
    def of(cls, records: Iterable[TrialRecord]) -> Self:
        """Return the sum over trials; derived points are none."""
        own = [record for record in records if record.derived_from is None]  # what others cost is in these
        costs = [record.evaluation.cost for record in own if record.duplicate_of is None]
        return cls(
            trials=sum(record.evaluation.status != "infeasible" for record in own), cost=Cost.total(costs)
        )

    def __add__(self, other: Spent) -> Spent:
        return Spent(trials=self.trials + other.trials, cost=self.cost + other.cost)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(trials=self.trials - other.trials, cost=self.cost - other.cost)


class TrialRecords(Sequence[TrialRecord]):
    """The finished and paused trials of a search, by number.

    Sum, front and lookups are kept up to date as records come: in a study of many thousands, looking at all
    of them for each trial would take longer than everything else.

    Args:
        objectives: The search's objectives, for the front.
        records: Trials to begin with.
    """

    def __init__(self, objectives: Sequence[Objective], records: Iterable[TrialRecord] = ()) -> None:
        self.spent = Spent()  # on all of them, but for rounding
        self.baselines: set[str] = set()  # names of those that were tried
        self._objectives = tuple(objectives)
        self._records: list[TrialRecord] = []
        self._tried: dict[str, TrialRecord] = {}  # by the configuration's key
        self._front: list[TrialRecord] | None = None  # None where all have to be compared
        for record in records:
            self.put(record)

    def put(self, record: TrialRecord) -> None:
        """Add a trial, or let it take the place of what was known of it."""
        before = self.numbered(record.number)
        if before is None:
            bisect.insort(self._records, record, key=_number)
        else:
            self._records[self._place(record.number)] = record
            self.spent -= Spent.of([before])
        self.spent += Spent.of([record])
        if before is not None and before.evaluation.status == "complete":
            self._front = None  # what was trained again may let others back
        elif self._front is not None:
            self._front = front_records([*self._front, *record.points], self._objectives)
        if record.baseline is not None:
            self.baselines.add(record.baseline)
        key = record.evaluation.configuration.key
        if record.duplicate_of is None and self._tried.get(key, record).number <= record.number:
            self._tried[key] = record

    def numbered(self, number: int) -> TrialRecord | None:
        """Return the trial of a number."""
        place = self._place(number)
        found = self._records[place : place + 1]
        return found[0] if found and found[0].number == number else None

    def tried(self, key: str) -> TrialRecord | None:
        """Return the latest trial that trained the configuration of a key; duplicates train nothing."""
        return self._tried.get(key)

    def front(self) -> list[TrialRecord]:
        """Return the front of all trials and of the points derived from them."""
        if self._front is None:
            points = [point for record in self._records for point in record.points]
            self._front = front_records(points, self._objectives)
        return self._front

    def _place(self, number: int) -> int:
        return bisect.bisect_left(self._records, number, key=_number)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> TrialRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrialRecord]: ...
    def __getitem__(self, index: int | slice) -> TrialRecord | list[TrialRecord]:
        return self._records[index]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._records!r})"
