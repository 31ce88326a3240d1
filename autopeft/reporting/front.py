"""The Pareto front of a search: a table, a plot, points to choose from and to export."""

from __future__ import annotations

import bisect
import copy
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rich.table import Table

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_choice, check_share, check_whole, shown
from autopeft.core.evaluation import TrialRecord
from autopeft.core.export_report import ExportReport
from autopeft.core.objectives import Constraint, Objective, parse_quantity, resolve_objectives
from autopeft.core.pareto import Axis, contributions, front_records, hypervolume, knee, thinned
from autopeft.core.tables import Tabular, titled_table
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.formats import methods_label
from autopeft.reporting.verdict import UNKNOWN, stored_verdict

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure


_number = attrgetter("number")
SHOWN_POINTS = 8
"""Points of a front that a report shows whole, where none other is asked for."""


@dataclass(frozen=True, repr=False)
class FrontPoint:
    """One trial on the front.

    Attributes:
        record: The trial.
        objectives: The search's objectives.
    """

    record: TrialRecord
    objectives: tuple[Objective, ...]
    _export: Callable[..., ExportReport] | None = None

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
        """Write the trained adapter to a folder; see `autopeft.Search.export` for options and report.

        Raises:
            ValueError: The front was read without its search, or the folder cannot be written.
        """
        if self._export is None:
            raise ValueError(
                "This front was read without its search, which holds backbone and data: make the "
                "search again and use search.export(...), or `autopeft export`."
            )
        return self._export(self.number, folder, **options)

    def __str__(self) -> str:
        evaluation = self.record.evaluation
        if evaluation.status != "complete":
            return f"trial {self.number} ({evaluation.status}: {evaluation.reason})"
        values = (f"{objective.name} {evaluation.format(objective)}" for objective in self.objectives)
        return f"trial {self.number}: {', '.join(values)}"

    def __repr__(self) -> str:
        return f"{self}\n{self.configuration.grid()}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>{configuration_svg(self.configuration)}"


class ParetoFront(Tabular, Sequence[FrontPoint]):
    """The trials that no other trial beats in every objective, cheapest first.

    Args:
        records: Every finished trial of the search; points derived from them are added.
        objectives: The search's objectives; the first metric sorts and chooses.
        axes: The fixed axes of hypervolume and knee point.
        export: `Search.export` of the search; None for a front read without it.
        verdict: Whether it beats a uniform LoRA sweep, as a sentence.
        search: Name of the search.
        backbone: The backbone's hub name, or that of its folder.
    """

    def __init__(
        self,
        records: Sequence[TrialRecord],
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        export: Callable[..., ExportReport] | None = None,
        verdict: str = UNKNOWN,
        *,
        search: str = "",
        backbone: str = "",
    ) -> None:
        trials = [record for record in records if record.derived_from is None]
        points = [point for record in trials for point in record.points]
        self.records = tuple(sorted(points, key=_number))
        self.objectives = tuple(objectives)
        self.axes = tuple(axes)
        self.metric = next(objective for objective in objectives if objective.is_metric)
        self._export = export
        self.verdict = verdict
        self.search, self.backbone = search, backbone
        self._points = self._sorted(front_records(self.records, self.objectives))

    def _sorted(self, members: Sequence[TrialRecord]) -> list[FrontPoint]:
        costs = [objective for objective in self.objectives if not objective.is_metric]
        return sorted(
            map(self._point, members),
            key=lambda point: [
                *(-cost.sign * point.values[cost.name] for cost in costs),
                point.values[self.metric.name],
                point.number,
            ],
        )

    @classmethod
    def stored(
        cls,
        attributes: Mapping[str, Any],
        records: Sequence[TrialRecord],
        export: Callable[..., ExportReport] | None = None,
    ) -> ParetoFront:
        """Return the front of a study that was read from disk; no model is loaded."""
        if not {"identity", "metrics", "axes"} <= attributes.keys():
            raise ValueError(
                f"The search {attributes['name']!r} has no finished trial yet: run it, again if it was "
                "stopped."
            )
        try:
            settings = attributes["identity"]["search"]["objectives"].split(", ")
            metrics = [Objective(**metric) for metric in attributes["metrics"]]
            objectives = resolve_objectives(settings, metrics)
            known = {objective.name: objective for objective in objectives}
            axes = [
                Axis(objective=known[name], worst=float(worst), best=float(best))
                for name, worst, best in attributes["axes"]
            ]
            verdict = stored_verdict(attributes.get("verdict", {}), records)
            backbone = attributes["identity"].get("backbone", {}).get("name", "")
            return cls(
                records, objectives, axes, export, verdict, search=attributes["name"], backbone=backbone
            )
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"The study of {attributes['name']!r} is damaged ({shown(error)}): restore it from a copy."
            ) from error

    def with_trial(self, record: TrialRecord) -> ParetoFront:
        """Return the front with one more finished trial, or with what became of one that it knows."""
        place = bisect.bisect_left(self.records, record.number, key=_number)
        if self.records[place : place + 1] and self.records[place].number == record.number:
            records = [known for known in self.records if known.trained != record.number]
            rivals = list(records)
        else:  # it drives members off the front, and brings nothing else onto it
            records, rivals = list(self.records), [point.record for point in self._points]
        for point in record.points:
            bisect.insort(records, point, key=_number)
        front = self._copy()
        front.verdict = UNKNOWN
        front.records = tuple(records)
        front._points = front._sorted(front_records([*rivals, *record.points], self.objectives))
        return front

    def _copy(self) -> ParetoFront:
        """Return a copy whose points may be set: it has yet to find its members and hypervolume."""
        front = copy.copy(self)
        for found in ("members", "hypervolume"):
            vars(front).pop(found, None)
        return front

    def _point(self, record: TrialRecord) -> FrontPoint:
        return FrontPoint(record, self.objectives, self._export)

    @cached_property
    def members(self) -> frozenset[int]:
        """Numbers of the trials on the front."""
        return frozenset(point.number for point in self._points)

    @cached_property
    def hypervolume(self) -> float:
        """Share of the fixed unit cube that the front dominates; see `autopeft.core.pareto.hypervolume`."""
        return hypervolume([point.values for point in self._points], self.axes)

    def shares(self) -> list[float]:
        """Return what each point adds to the hypervolume, as a share of what all add.

        Half an even part is added: of two points that are much alike, each adds next to nothing to the other.
        """
        added = contributions([point.values for point in self._points], self.axes)
        mean = sum(added) / max(1, len(added)) or 1.0
        return [(share + mean / 2) / (sum(added) + len(added) * mean / 2) for share in added]

    def __len__(self) -> int:
        return len(self._points)

    @overload
    def __getitem__(self, index: int) -> FrontPoint: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[FrontPoint]: ...
    def __getitem__(self, index: int | slice) -> FrontPoint | Sequence[FrontPoint]:
        return self._points[index]

    def best(self, **bounds: float | str) -> FrontPoint:
        """Return the point with the best metric that keeps every bound.

        Args:
            bounds: Largest value of a cost ("2M", "12 GiB" or a number) or of a metric that is better when
                smaller, or smallest of one that is better when larger.

        Raises:
            ValueError: A name is no objective, or no point keeps the bounds; the message says which
                comes closest.
        """
        known = {objective.name: objective for objective in self.objectives}
        self._require_points()
        candidates = list(self._points)
        for name, bound in bounds.items():
            check_choice("objective", known, name)
            objective = known[name]
            limit = Constraint(objective=objective, bound=parse_quantity(bound, objective.unit))
            closest = min(candidates, key=lambda point: limit.violation(point.values))
            candidates = [point for point in candidates if limit.violation(point.values) <= 0]
            if not candidates:
                sign = "≥" if objective.direction == "maximize" else "≤"
                raise ValueError(
                    f"No point of the front has {name} {sign} {objective.format(limit.bound)} (with the "
                    f"bounds before it); the closest is {closest}."
                )
        return max(candidates, key=lambda point: self.metric.sign * point.values[self.metric.name])

    def knee(self, tolerance: float = 0.05) -> FrontPoint:
        """Return the cheapest point with almost the best metric; see `autopeft.core.pareto.knee`.

        Args:
            tolerance: How far below the best the metric may lie, as a share of its axis (from the trivial
                score to the best value).

        Raises:
            ValueError: The front is empty, or the tolerance is not a share.
        """
        check_share("tolerance", tolerance, of="metric's axis")
        self._require_points()
        return self._points[knee([point.values for point in self._points], self.axes, tolerance)]

    def thinned(self, points: int) -> ParetoFront:
        """Return the front with so many points at most: the knee point, and what makes the hypervolume large.

        See `autopeft.core.pareto.thinned`. The trials are all there, and no trial comes onto the front anew.

        Raises:
            ValueError: The number of points is below 1.
        """
        check_whole("points", points, least=1)
        front = self._copy()
        values = [point.values for point in self._points]
        if len(values) > points:
            kept = thinned(values, self.axes, points, keep=[knee(values, self.axes)])
            front._points = [self._points[index] for index in kept]
        return front

    def trial(self, number: int) -> FrontPoint:
        """Return a trial by its number, on the front or not, completed or not.

        Raises:
            ValueError: There is no such trial.
        """
        record = next((record for record in self.records if record.number == number), None)
        if record is None:
            raise ValueError(f"There is no trial {number}; there are {len(self.records)} trials.")
        return self._point(record)

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

    def to_html(self, points: int = SHOWN_POINTS) -> str:
        """Return what `report` writes."""
        from autopeft.reporting.front_page import front_page

        return front_page(
            self.records,
            self.members,
            [point.record for point in self.thinned(points)],
            self.objectives,
            table=self.table(),
            knee=self.knee().number if self._points else None,
            search=self.search,
            backbone=self.backbone,
        )

    def report(self, folder: str | Path, *, points: int = SHOWN_POINTS) -> Path:
        """Write `report.html` into a folder and return its path: one page (about 5 MB) without a network.

        It has the verdict, the front, its points as a table and, of so many at most, configurations, learning
        curves and how they are loaded; and what the search has spent.

        Raises:
            ValueError: The number of points is below 1.
            OSError: The folder cannot be written.
        """
        path = Path(folder) / "report.html"
        page = self.to_html(points)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
        return path

    def table(self) -> Table:
        """Return the front as a rich table, with a line that says whether it beats a uniform LoRA sweep."""
        says_start = any(point.record.evaluation.warm_start for point in self._points)
        has_derived = any(record.derived_from is not None for record in self.records)
        what = "trials and points derived from them" if has_derived else "trials"
        title = f"Pareto front: {len(self)} of {len(self.records)} {what}, hypervolume {self.hypervolume:.4f}"
        headings = ["trial", *(objective.name for objective in self.objectives)]
        headings += ["methods", "adapters", "blocks", "learning rate"]
        headings += ["initialised from"] if says_start else []
        table = titled_table(title, headings, words=("methods", "initialised from"))
        if self._points:
            table.caption = self.verdict
        for point in self._points:
            configuration, evaluation = point.configuration, point.record.evaluation
            table.add_row(
                str(point.number),
                *(evaluation.format(objective) for objective in self.objectives),
                methods_label(configuration, point.values),
                str(len(configuration)),
                str(len({site.place for site in configuration.adapters})),
                f"{configuration.learning_rate:.2g}",
                *([evaluation.initialised_from] if says_start else []),
            )
        return table
