"""The Pareto front of a search: a table, a plot, points to choose from and to export."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Table

from autopeft.core.configuration import Configuration
from autopeft.core.errors import unknown_choice
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective, parse_quantity
from autopeft.core.pareto import Axis, hypervolume, knee, non_dominated

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure

    from autopeft.export.export import ExportReport


class Exporter(Protocol):
    """Whoever can write a trial's adapter: the search it came from."""

    def export(
        self,
        number: int,
        folder: str | Path,
        *,
        merged: bool = ...,
        retrain: bool = ...,
        seed: int | None = ...,
        overwrite: bool = ...,
    ) -> ExportReport:
        """Export one trial; see `autopeft.Search.export`."""


@dataclass(frozen=True)
class FrontPoint:
    """One trial on the front.

    Attributes:
        record: The trial.
        objectives: The search's objectives.
    """

    record: TrialRecord
    objectives: tuple[Objective, ...] = field(repr=False)
    _exporter: Exporter | None = field(default=None, repr=False)

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.record.number

    @property
    def configuration(self) -> Configuration:
        """The trial's configuration."""
        return self.record.evaluation.configuration

    @property
    def values(self) -> Mapping[str, float]:
        """Objectives and metrics by name, on the validation split."""
        return self.record.evaluation.values

    def export(self, folder: str | Path, **options: Any) -> ExportReport:
        """Write the trained adapter to a folder; see `autopeft.Search.export` for the options.

        Raises:
            ValueError: The front was read without its search, or the folder cannot be written.
        """
        if self._exporter is None:
            raise ValueError(
                "This front was read without its search, which holds backbone and data: make the "
                "search again and use search.export(...), or `autopeft export`."
            )
        return self._exporter.export(self.number, folder, **options)

    def __str__(self) -> str:
        values = ", ".join(f"{one.name} {self.record.evaluation.format(one)}" for one in self.objectives)
        return f"trial {self.number}: {values}"


class ParetoFront(Sequence[FrontPoint]):
    """The trials that no other trial beats in every objective, cheapest first.

    Args:
        records: Every finished trial of the search.
        objectives: The search's objectives; the first metric sorts and chooses.
        axes: The fixed axes of hypervolume and knee point.
        exporter: The search; None for a front read from disk.
        candidates: The records among which the front is known to be; all by default.
    """

    def __init__(
        self,
        records: Sequence[TrialRecord],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        exporter: Exporter | None = None,
        *,
        candidates: Sequence[TrialRecord] | None = None,
    ) -> None:
        self.records = tuple(records)
        self.objectives = tuple(objectives)
        self.axes = tuple(axes)
        self.metric = next(one for one in objectives if one.is_metric)
        self._exporter = exporter
        points = [
            FrontPoint(record, self.objectives, exporter)
            for record in front_records(self.records if candidates is None else candidates, self.objectives)
        ]
        costs = [one for one in self.objectives if one.direction == "minimize"]
        self._points = sorted(
            points,
            key=lambda point: [*(point.values[one.name] for one in (*costs, self.metric)), point.number],
        )

    def would_hold(self, record: TrialRecord) -> bool:
        """Return whether a trial that is not on the front would come onto it."""
        found = front_records([*(point.record for point in self._points), record], self.objectives)
        return bool(found) and found[-1] is record

    def with_trial(self, record: TrialRecord) -> ParetoFront:
        """Return the front with one more finished trial, or with what became of one that it knows.

        Only members and the new one can be on it, unless a member has other values now: whom it had driven
        off may then be back.
        """
        records = list(self.records)
        place = next((place for place, one in enumerate(records) if one.number == record.number), None)
        if place is None:
            records.append(record)
        else:
            records[place] = record
        was_member = record.number in self.members
        if not was_member and not self.would_hold(record):
            front = copy.copy(self)  # the same members, and a hypervolume that is slow to compute
            front.records = tuple(records)
            return front
        candidates = None if was_member else [*(point.record for point in self._points), record]
        return ParetoFront(records, self.objectives, self.axes, self._exporter, candidates=candidates)

    @cached_property
    def members(self) -> frozenset[int]:
        """Numbers of the trials on the front."""
        return frozenset(point.number for point in self._points)

    @cached_property
    def hypervolume(self) -> float:
        """Share of the fixed unit cube that the front dominates; see `autopeft.core.pareto.hypervolume`."""
        return hypervolume([point.values for point in self._points], self.axes)

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: Any) -> Any:
        return self._points[index]

    def __iter__(self) -> Iterator[FrontPoint]:
        return iter(self._points)

    def best(self, **bounds: float | str) -> FrontPoint:
        """Return the point with the best metric that keeps every bound.

        Args:
            bounds: Largest value of a cost ("2M", "12 GiB" or a number), or smallest of a metric.

        Raises:
            ValueError: A name is no objective, or no point keeps the bounds; the message says which
                comes closest.
        """
        known = {objective.name: objective for objective in self.objectives}
        self._require_points()
        candidates = list(self._points)
        for name, bound in bounds.items():
            if name not in known:
                raise unknown_choice("objective", name, known)
            objective = known[name]
            limit = parse_quantity(bound, objective.unit)
            more = objective.direction == "maximize"
            closest = (max if more else min)(candidates, key=lambda point: point.values[name])
            candidates = [
                point
                for point in candidates
                if (point.values[name] >= limit if more else point.values[name] <= limit)
            ]
            if not candidates:
                sign = "≥" if more else "≤"
                raise ValueError(
                    f"No point of the front has {name} {sign} {objective.format(limit)} (with the "
                    f"bounds before it); the closest is {closest}."
                )
        return max(candidates, key=lambda point: point.values[self.metric.name])

    def knee(self) -> FrontPoint:
        """Return the point closest to the best corner of the fixed axes; see `autopeft.core.pareto.knee`."""
        self._require_points()
        return self._points[knee([point.values for point in self._points], self.axes)]

    def trial(self, number: int) -> FrontPoint:
        """Return a trial by its number, on the front or not, completed or not.

        Raises:
            ValueError: There is no such trial.
        """
        record = next((one for one in self.records if one.number == number), None)
        if record is None:
            raise ValueError(f"There is no trial {number}; there are {len(self.records)} trials.")
        return FrontPoint(record, self.objectives, self._exporter)

    def _require_points(self) -> None:
        if not self._points:
            raise ValueError(f"The front is empty: none of the {len(self.records)} trials completed.")

    def to_frame(self, *, all_trials: bool = False) -> pandas.DataFrame:
        """Return the front as a data frame, cheapest first, or all trials in their order: a row a trial."""
        from autopeft.reporting.frame import front_frame

        frame = front_frame(self.records, self.members, self.objectives)
        if all_trials:
            return frame
        return frame.set_index("trial").loc[[point.number for point in self._points]].reset_index()

    def plot(self) -> Figure:
        """Return a plotly figure: each cost against the metric, all trials, the front emphasised."""
        from autopeft.reporting.front_plots import front_figure

        return front_figure(self.records, self.members, self.objectives)

    def table(self) -> Table:
        """Return the front as a rich table."""
        table = Table(title=self._title(), title_justify="left")
        table.add_column("trial", justify="right")
        for objective in self.objectives:
            table.add_column(objective.name, justify="right")
        for heading in ("methods", "adapters", "blocks", "learning rate"):
            table.add_column(heading, justify="right" if heading != "methods" else "left")
        says_start = any(point.record.evaluation.warm_start for point in self._points)
        if says_start:  # else all began alike
            table.add_column("initialised from")
        for point in self._points:
            configuration = point.configuration
            blocks = len({site.block for site in configuration.adapters})
            table.add_row(
                str(point.number),
                *(point.record.evaluation.format(one) for one in self.objectives),
                "+".join(configuration.methods) or "head alone",
                str(len(configuration)),
                str(blocks),
                f"{configuration.learning_rate:.2g}",
                *([point.record.evaluation.initialised_from] if says_start else []),
            )
        return table

    def _title(self) -> str:
        return f"Pareto front: {len(self)} of {len(self.records)} trials, hypervolume {self.hypervolume:.4f}"

    def __repr__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def _repr_html_(self) -> str:
        html: str = self.to_frame().to_html(index=False)
        return f"<p>{self._title()}</p>{html}"


def front_records(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the completed, non-dominated records; a duplicate's original stands for it."""
    complete = [
        record for record in records if record.evaluation.status == "complete" and record.duplicate_of is None
    ]
    flags = non_dominated([record.evaluation.values for record in complete], objectives)
    return [record for record, on_front in zip(complete, flags, strict=True) if on_front]
