"""Pictures of a search: the front, interactive and static."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import non_dominated

# Okabe and Ito's palette, which people with any colour vision can tell apart.
FRONT_COLOUR = "#D55E00"
KNEE_COLOUR = "#009E73"
BASELINE_COLOUR = "#0072B2"
OTHER_COLOUR = "#7F7F7F"

_MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
_with_prefix = EngFormatter(sep="")
_OUTCOMES = {"paused": "stopped early", "failed": "failed", "infeasible": "infeasible"}
_LABEL_PIXELS = (26, 16)  # width and height of a trial's number in the static picture


def projections(objectives: Sequence[Objective]) -> list[tuple[Objective, Objective]]:
    """Return the (x, y) pairs to draw: the first metric upwards against each other objective."""
    first = next((objective for objective in objectives if objective.is_metric), objectives[0])
    return [(objective, first) for objective in objectives if objective.name != first.name]


@dataclass(frozen=True)
class _Group:
    """Trials that are drawn alike, with markers of a size in pixels (a browser's) or points (a file's)."""

    name: str
    records: list[TrialRecord]
    colour: str
    size: int
    opacity: float = 1.0

    def trace(self, objectives: Sequence[Objective], *, size: int, in_legend: bool) -> dict[str, Any]:
        """Return what plotly's traces of the group have in common."""
        symbols = ["circle" if record.baseline is None else "diamond" for record in self.records]
        marker = {"color": self.colour, "size": size, "opacity": self.opacity, "symbol": symbols}
        return {
            "mode": "markers",
            "name": self.name,
            "legendgroup": self.name,
            "showlegend": in_legend,
            "marker": marker | {"line": {"color": "white", "width": 1}},
            "text": [_hover(record, objectives) for record in self.records],
            "hoverinfo": "text",
        }


def front_figure(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> go.Figure:
    """Draw the front for a browser.

    One panel for each pair of `projections`; with three objectives a panel in three dimensions too.
    Completed trials only; the best that has none of a cost, as the untrained model has no parameters, has no
    place on a logarithmic axis and is a line at the height of its metric. Pointing at a trial shows its
    number, values and configuration; a bar is the standard deviation over the trainings of a trial that was
    trained again. The stairs join the members that are best in the panel's own two objectives: with three
    objectives, a member above them is on the front by the third. `members` are the numbers of the trials on
    the front.
    """
    pairs, drawn = projections(objectives), _drawable(records, objectives)
    groups = _groups(drawn, members)
    figure = _empty_figure(len(pairs), solid=len(pairs) == 2)
    for column, (x, y) in enumerate(pairs, start=1):
        stairs = _stairs(drawn, members, x, y)
        line = {"shape": "hv", "color": FRONT_COLOUR, "width": 1.5}
        style: dict[str, Any] = {"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(x=_shown(stairs, x), y=_shown(stairs, y), **style, row=1, col=column)
        for group in groups:
            figure.add_scatter(
                x=_shown(group.records, x),
                y=_shown(group.records, y),
                error_y={"array": _deviations(group.records, y), "thickness": 1, "width": 0},
                **group.trace(objectives, size=group.size, in_legend=column == 1),
                row=1,
                col=column,
            )
        for record in _off_scale(records, objectives) if drawn else ():
            height = _shown([record], y) * 2
            figure.add_scatter(
                x=[min(_shown(drawn, x)), max(_shown(drawn, x))],
                y=height,
                mode="lines",
                line={"color": BASELINE_COLOUR, "width": 1.5, "dash": "dot"},
                name=html.escape(trial_name(record)),
                legendgroup=trial_name(record),
                showlegend=column == 1,
                text=[_hover(record, objectives)] * 2,
                hoverinfo="text",
                row=1,
                col=column,
            )
        figure.update_xaxes(_plotly_axis(x, drawn), row=1, col=column)
        figure.update_yaxes(_plotly_axis(y, drawn), row=1, col=column)
    if len(pairs) == 2:
        axes = dict(zip("xyz", (pairs[0][0], pairs[1][0], pairs[0][1]), strict=True))
        for group in groups:
            figure.add_scatter3d(
                **{letter: _shown(group.records, objective) for letter, objective in axes.items()},
                **group.trace(objectives, size=group.size // 2, in_legend=False),
                row=2,
                col=1,
            )
        camera = {"eye": {"x": -1.9, "y": -1.9, "z": 1.1}, "center": {"z": -0.25}}
        scene = {f"{letter}axis": _plotly_axis(objective, drawn) for letter, objective in axes.items()}
        figure.update_scenes(scene | {"camera": camera})
    figure.update_layout(title={"text": _title(records, objectives, members), "x": 0.02})
    return figure


def _empty_figure(columns: int, *, solid: bool) -> go.Figure:
    rows: list[list[dict[str, Any] | None]] = [[{"type": "xy"} for _ in range(columns)]]
    if solid:
        rows.append([{"type": "scene", "colspan": columns}, *[None] * (columns - 1)])
    figure = make_subplots(
        rows=len(rows), cols=columns, specs=rows, horizontal_spacing=0.09, vertical_spacing=0.1
    )
    figure.update_layout(
        template="plotly_white",
        height=1100 if solid else 540,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"font": {"family": _MONOSPACE, "size": 12}, "align": "left", "bgcolor": "white"},
    )
    return figure


def _plotly_axis(objective: Objective, drawn: Sequence[TrialRecord]) -> dict[str, Any]:
    settings: dict[str, Any] = {"title": {"text": html.escape(_axis_title(objective))}}
    if objective.log_scale and drawn:
        ticks = _log_ticks(objective, drawn)
        settings |= {"type": "log", "tickvals": ticks, "ticktext": [_tick_label(tick) for tick in ticks]}
    return settings


def _hover(record: TrialRecord, objectives: Sequence[Objective]) -> str:
    evaluation = record.evaluation
    values = [html.escape(f"{each.name} {evaluation.format(each)}") for each in objectives]
    rest = f"learning_rate {evaluation.configuration.learning_rate:g}"
    grid = html.escape(evaluation.configuration.grid()).splitlines()
    return "<br>".join([f"<b>{html.escape(trial_name(record))}</b>", *values, rest, "", *grid])


def trial_name(record: TrialRecord) -> str:
    """Return a trial's number and origin, as in "trial 3 · lora(8) everywhere"."""
    origin = "" if record.derived_from is None else f" · cut from trial {record.derived_from}"
    return f"trial {record.number}{origin}" + (f" · {record.baseline}" if record.baseline else "")


def static_front_figure(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> Figure:
    """Draw the front's panels for a file; trials on the stairs carry their number where there is room."""
    pairs, drawn = projections(objectives), _drawable(records, objectives)
    figure = Figure(figsize=(5.6 * len(pairs), 4.6), dpi=120, layout="constrained")
    figure.suptitle(_title(records, objectives, members), fontsize=12)
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        _draw_panel(axes, drawn, members, x, y)
        for record in _off_scale(records, objectives):
            axes.axhline(
                *_shown([record], y), color=BASELINE_COLOUR, ls=":", lw=1.5, label=trial_name(record)
            )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw_panel(
    axes: Axes, drawn: Sequence[TrialRecord], members: Collection[int], x: Objective, y: Objective
) -> None:
    for group in _groups(drawn, members):
        for symbol in ("o", "D"):
            some = [record for record in group.records if (record.baseline is None) == (symbol == "o")]
            axes.errorbar(
                _shown(some, x),
                _shown(some, y),
                yerr=_deviations(some, y),
                fmt=symbol,
                color=group.colour,
                markersize=group.size * (0.84 if symbol == "D" else 1),
                markeredgecolor="white",
                markeredgewidth=0.8,
                elinewidth=0.8,
                capsize=2,
                alpha=group.opacity,
                zorder=3 if group.name == "front" else 2,
                label=group.name if (symbol == "D") == (group.name == "baseline") else None,
            )
    stairs = _stairs(drawn, members, x, y)
    points = list(zip(_shown(stairs, x), _shown(stairs, y), strict=True))
    axes.step(_shown(stairs, x), _shown(stairs, y), where="post", color=FRONT_COLOUR, lw=1.2)
    axes.set(xlabel=_axis_title(x), ylabel=_axis_title(y))
    axes.margins(0.06)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for objective, axis, set_scale in ((x, axes.xaxis, axes.set_xscale), (y, axes.yaxis, axes.set_yscale)):
        if objective.log_scale and drawn:
            set_scale("log")
            axis.set_major_locator(FixedLocator(_log_ticks(objective, drawn)))
            axis.set_major_formatter(_tick_label)
            axis.set_minor_locator(NullLocator())
    width, height = _LABEL_PIXELS
    taken: list[tuple[float, float]] = []
    for record, point in reversed(list(zip(stairs, points, strict=True))):
        left, below = axes.transData.transform(point)
        if all(abs(left - other[0]) > width or abs(below - other[1]) > height for other in taken):
            taken.append((left, below))
            axes.annotate(
                str(record.number), point, (0, 7), textcoords="offset points", ha="center", fontsize=8
            )


def _drawable(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the completed trials with a finite value of every objective, log-scale ones above 0."""
    return [record for record in _finite(records, objectives) if not _has_zeros(record, objectives)]


def _off_scale(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the best trial that has none of a cost, which a logarithmic axis has no place for, if any."""
    costs = [objective for objective in objectives if not objective.is_metric]
    others = [objective for objective in objectives if objective.is_metric]
    finite, (_, metric) = _finite(records, objectives), projections(objectives)[0]
    found = [record for record in finite if _has_zeros(record, costs) and not _has_zeros(record, others)]
    return sorted(found, key=lambda record: -metric.sign * record.evaluation.values[metric.name])[:1]


def _finite(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    return [
        record
        for record in records
        if record.evaluation.status == "complete"
        and all(math.isfinite(record.evaluation.values.get(each.name, math.nan)) for each in objectives)
    ]


def _has_zeros(record: TrialRecord, objectives: Sequence[Objective]) -> bool:
    """Whether a value on a logarithmic axis is not above 0."""
    return any(each.log_scale and record.evaluation.values[each.name] <= 0 for each in objectives)


def _groups(drawn: Sequence[TrialRecord], members: Collection[int]) -> list[_Group]:
    """Return the groups, what is drawn last (the front) at the end."""
    front = [record for record in drawn if record.number in members]
    rest = [record for record in drawn if record.number not in members]
    return [
        _Group("trial", [record for record in rest if record.baseline is None], OTHER_COLOUR, 7, 0.6),
        _Group("baseline", [record for record in rest if record.baseline], BASELINE_COLOUR, 9),
        _Group("front", front, FRONT_COLOUR, 11),
    ]


def _stairs(
    drawn: Sequence[TrialRecord], members: Collection[int], x: Objective, y: Objective
) -> list[TrialRecord]:
    """Return the members no other member beats in x and y, from the best x to the best y."""
    front = [record for record in drawn if record.number in members]
    best = non_dominated([record.evaluation.values for record in front], (x, y))
    return sorted(
        (record for record, keep in zip(front, best, strict=True) if keep),
        key=lambda record: record.evaluation.values[x.name],
        reverse=x.direction == "maximize",
    )


def _shown(records: Sequence[TrialRecord], objective: Objective) -> list[float]:
    """Return the records' values of an objective, bytes as MiB."""
    factor = 2**-20 if objective.unit == "bytes" else 1.0
    return [record.evaluation.values[objective.name] * factor for record in records]


def _deviations(records: Sequence[TrialRecord], metric: Objective) -> list[float]:
    """Return the standard deviations over the trainings of each trial; NaN where there was one alone."""
    found = (record.evaluation.deviation(metric) for record in records)
    return [math.nan if deviation is None else deviation for deviation in found]


def _log_ticks(objective: Objective, drawn: Sequence[TrialRecord]) -> list[float]:
    """Return round numbers along a logarithmic axis."""
    values = _shown(drawn, objective)
    low, high = min(values) / 1.02, max(values) * 1.02
    subdivisions = (1, 2, 5) if high < 1e4 * low else (1,)
    locator = MaxNLocator(6) if high < 10 * low else LogLocator(subs=subdivisions)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _tick_label(value: float, position: object = None) -> str:
    return _with_prefix(value) if value >= 1000 else f"{value:g}"


def _axis_title(objective: Objective) -> str:
    units = {"bytes": " (MiB)", "seconds": " (s)"}
    return objective.name.replace("_", " ") + units.get(objective.unit, "")


def _title(records: Sequence[TrialRecord], objectives: Sequence[Objective], members: Collection[int]) -> str:
    drawn = _finite(records, objectives)
    counts = Counter(_OUTCOMES.get(record.evaluation.status) for record in records)
    on_front = sum(record.number in members for record in drawn)
    rest = "".join(f"; {counts[words]} {words}" for words in _OUTCOMES.values() if counts[words])
    return f"{len(drawn)} complete, {on_front} on the front{rest}"
