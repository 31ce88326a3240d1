"""Pictures of a search: the front, interactive and static."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Collection, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import non_dominated

# Okabe and Ito's palette, which people with any colour vision can tell apart.
FRONT_COLOUR = "#D55E00"
REFERENCE_COLOUR = "#0072B2"
OTHER_COLOUR = "#7F7F7F"

_MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
_TICK_MANTISSAS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
_TICK_STEPS = (0.02, 0.025, 0.05, 0.1, 0.2)
_LABEL_SIZE = (26, 16)
"""Width and height of a trial's number in the static picture, in pixels."""


def projections(objectives: Sequence[Objective]) -> list[tuple[Objective, Objective]]:
    """Return the (x, y) pairs to draw: the first metric upwards against each other objective."""
    first = next((objective for objective in objectives if objective.is_metric), objectives[0])
    return [(objective, first) for objective in objectives if objective.name != first.name]


def front_figure(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> go.Figure:
    """Draw the front for a browser.

    One panel for each pair of `projections`; with three objectives a panel in three dimensions too.
    Completed trials only. Pointing at a trial shows its number, values and configuration; a bar is the
    standard deviation over the trainings of a trial that was trained again. The stairs join the members that
    are best in the panel's own two objectives: with three objectives, a member above them is on the front
    by the third.

    Args:
        records: The search's trials.
        members: Numbers of the trials on the front.
        objectives: What the axes show, the first metric upwards.
    """
    pairs, solid = projections(objectives), len(objectives) == 3
    figure = _empty_figure(len(pairs), solid)
    drawn = _drawable(records, objectives)
    for column, (x, y) in enumerate(pairs, start=1):
        front = [record for record in drawn if record.number in members]
        stairs = _stairs(front, x, y)
        figure.add_trace(
            go.Scatter(
                x=[_shown(record, x) for record in stairs],
                y=[_shown(record, y) for record in stairs],
                mode="lines",
                line={"shape": "hv", "color": FRONT_COLOUR, "width": 1.5},
                hoverinfo="skip",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
        for name, group, marker in _groups(drawn, members):
            figure.add_trace(
                go.Scatter(
                    x=[_shown(record, x) for record in group],
                    y=[_shown(record, y) for record in group],
                    error_y=_error_bars(group, y),
                    marker=marker,
                    **_common(name, group, objectives, shown_in_legend=column == 1),
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(_plotly_axis(x, drawn), row=1, col=column)
        figure.update_yaxes(_plotly_axis(y, drawn), row=1, col=column)
    if solid:
        _add_solid(figure, drawn, members, objectives)
    figure.update_layout(title={"text": _title(records, drawn, members), "x": 0.02})
    return figure


def front_image(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> bytes:
    """Draw the front's panels as a PNG.

    Args:
        records: The search's trials.
        members: Numbers of the trials on the front; those on the stairs carry theirs where there is room.
        objectives: What the axes show, the first metric upwards.
    """
    pairs = projections(objectives)
    drawn = _drawable(records, objectives)
    figure = Figure(figsize=(5.6 * len(pairs), 4.6), dpi=120, layout="constrained")
    figure.suptitle(_title(records, drawn, members), fontsize=12)
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        _draw_panel(axes, drawn, members, x, y)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _drawable(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the completed trials with a finite value of every objective, log-scale ones above 0."""
    return [
        record
        for record in records
        if record.evaluation.status == "complete"
        and all(
            math.isfinite(value := record.evaluation.values.get(objective.name, math.nan))
            and (value > 0 or not objective.log_scale)
            for objective in objectives
        )
    ]


def _stairs(front: Sequence[TrialRecord], x: Objective, y: Objective) -> list[TrialRecord]:
    """Return the members no other member beats in x and y, from the best x to the best y."""
    best = non_dominated([record.evaluation.values for record in front], (x, y))
    kept = [record for record, keep in zip(front, best, strict=True) if keep]
    return sorted(
        kept,
        key=lambda record: record.evaluation.values[x.name],
        reverse=x.direction == "maximize",
    )


def _factor(objective: Objective) -> float:
    return 2**-20 if objective.unit == "bytes" else 1.0


def _shown(record: TrialRecord, objective: Objective) -> float:
    return record.evaluation.values[objective.name] * _factor(objective)


def _error_bars(group: Sequence[TrialRecord], y: Objective) -> dict[str, Any] | None:
    deviations = [record.evaluation.deviation(y) for record in group]
    known = any(deviation is not None for deviation in deviations)
    return {"array": deviations, "thickness": 1, "width": 0} if known else None


def _axis_title(objective: Objective) -> str:
    units = {"bytes": " (MiB)", "seconds": " (s)"}
    return objective.name.replace("_", " ") + units.get(objective.unit, "")


def _title(records: Sequence[TrialRecord], drawn: Sequence[TrialRecord], members: Collection[int]) -> str:
    left_out = sum(record.evaluation.status != "complete" for record in records)
    on_front = sum(record.number in members for record in drawn)
    rest = f"; {left_out} did not complete" if left_out else ""
    return f"{len(drawn)} trials, {on_front} on the front{rest}"


def _ticks(low: float, high: float) -> list[float]:
    """Return at least four round numbers along a logarithmic axis from low to high."""
    low, high = low / 1.02, high * 1.02
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _TICK_MANTISSAS:
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) >= 4:
            return ticks[:: math.ceil(len(ticks) / 9)]
    decade = 10.0 ** math.ceil(math.log10(high - low))
    step = next(s * decade for s in _TICK_STEPS if (high - low) / (s * decade) <= 6)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _tick_label(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if prefix == 'k' else size):g}{prefix}"
    return f"{value:g}"


def _labelled_ticks(objective: Objective, drawn: Sequence[TrialRecord]) -> tuple[list[float], list[str]]:
    values = [_shown(record, objective) for record in drawn]
    ticks = _ticks(min(values), max(values))
    return ticks, [_tick_label(tick) for tick in ticks]


def _plotly_axis(objective: Objective, drawn: Sequence[TrialRecord]) -> dict[str, Any]:
    settings: dict[str, Any] = {"title": {"text": _axis_title(objective)}}
    if objective.log_scale and drawn:
        ticks, labels = _labelled_ticks(objective, drawn)
        settings |= {"type": "log", "tickvals": ticks, "ticktext": labels}
    return settings


def _groups(
    drawn: Sequence[TrialRecord], members: Collection[int]
) -> list[tuple[str, list[TrialRecord], dict[str, Any]]]:
    """Return (name, trials, plotly marker), what is drawn last (the front) at the end."""
    front = [record for record in drawn if record.number in members]
    rest = [record for record in drawn if record.number not in members]
    edge = {"color": "white", "width": 1}
    symbols = ["circle" if record.baseline is None else "diamond" for record in front]
    return [
        (
            "trial",
            [record for record in rest if record.baseline is None],
            {"color": OTHER_COLOUR, "size": 7, "opacity": 0.6},
        ),
        (
            "reference point",
            [record for record in rest if record.baseline is not None],
            {"color": REFERENCE_COLOUR, "size": 9, "symbol": "diamond", "line": edge},
        ),
        ("front", front, {"color": FRONT_COLOUR, "size": 11, "symbol": symbols, "line": edge}),
    ]


def _common(
    name: str,
    group: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    *,
    shown_in_legend: bool,
) -> dict[str, Any]:
    return {
        "mode": "markers",
        "name": name,
        "legendgroup": name,
        "showlegend": shown_in_legend,
        "text": [_hover(record, objectives) for record in group],
        "hoverinfo": "text",
    }


def _hover(record: TrialRecord, objectives: Sequence[Objective]) -> str:
    evaluation = record.evaluation
    name = f"trial {record.number}" + (f" · {record.baseline}" if record.baseline else "")
    values = [f"{objective.name} {evaluation.format(objective)}" for objective in objectives]
    rest = f"learning_rate {evaluation.configuration.learning_rate:g}"
    grid = html.escape(evaluation.configuration.grid()).splitlines()
    lines = [f"<b>{html.escape(name)}</b>", *values, rest, "", *grid]
    return "<br>".join(lines)


def _empty_figure(columns: int, solid: bool) -> go.Figure:
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
        hoverlabel={
            "font": {"family": _MONOSPACE, "size": 12},
            "align": "left",
            "bgcolor": "white",
        },
    )
    return figure


def _add_solid(
    figure: go.Figure,
    drawn: Sequence[TrialRecord],
    members: Collection[int],
    objectives: Sequence[Objective],
) -> None:
    (x, z), (y, _) = projections(objectives)
    for name, group, marker in _groups(drawn, members):
        figure.add_trace(
            go.Scatter3d(
                x=[_shown(record, x) for record in group],
                y=[_shown(record, y) for record in group],
                z=[_shown(record, z) for record in group],
                marker=marker | {"size": marker["size"] / 2},
                **_common(name, group, objectives, shown_in_legend=False),
            ),
            row=2,
            col=1,
        )
    figure.update_scenes(
        {
            "xaxis": _plotly_axis(x, drawn),
            "yaxis": _plotly_axis(y, drawn),
            "zaxis": _plotly_axis(z, drawn),
            "camera": {"eye": {"x": -1.9, "y": -1.9, "z": 1.1}, "center": {"z": -0.25}},
        }
    )


def _draw_panel(
    axes: Axes,
    drawn: Sequence[TrialRecord],
    members: Collection[int],
    x: Objective,
    y: Objective,
) -> None:
    for name, group, marker in _groups(drawn, members):
        for symbol in ("o", "D"):
            some = [record for record in group if (record.baseline is None) == (symbol == "o")]
            axes.scatter(
                [_shown(record, x) for record in some],
                [_shown(record, y) for record in some],
                s=marker["size"] ** 2 * (0.7 if symbol == "D" else 1),
                c=marker["color"],
                marker=symbol,
                alpha=marker.get("opacity", 1),
                edgecolors="white",
                linewidths=0.8,
                zorder=3 if name == "front" else 2,
                label=name if (symbol == "D") == (name == "reference point") else None,
            )
        repeated = [record for record in group if record.evaluation.deviation(y) is not None]
        axes.errorbar(
            [_shown(record, x) for record in repeated],
            [_shown(record, y) for record in repeated],
            yerr=[record.evaluation.deviation(y) or 0.0 for record in repeated],
            fmt="none",
            ecolor=marker["color"],
            elinewidth=0.8,
            capsize=2,
            alpha=marker.get("opacity", 1),
        )
    stairs = _stairs([record for record in drawn if record.number in members], x, y)
    points = [(_shown(record, x), _shown(record, y)) for record in stairs]
    axes.step(*zip(*points, strict=True), where="post", color=FRONT_COLOUR, lw=1.2) if points else None
    axes.set(xlabel=_axis_title(x), ylabel=_axis_title(y))
    axes.margins(0.06)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for objective, axis, scale in (
        (x, axes.xaxis, axes.set_xscale),
        (y, axes.yaxis, axes.set_yscale),
    ):
        if objective.log_scale and drawn:
            scale("log")
            ticks, labels = _labelled_ticks(objective, drawn)
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter(FixedFormatter(labels))
            axis.set_minor_locator(NullLocator())
    _label(axes, stairs, points)


def _label(axes: Axes, stairs: Sequence[TrialRecord], points: Sequence[tuple[float, float]]) -> None:
    """Write trial numbers above the points, but not over one another."""
    taken: list[tuple[float, float]] = []
    for record, point in reversed(list(zip(stairs, points, strict=True))):
        x, y = axes.transData.transform(point)
        if all(abs(x - left) > _LABEL_SIZE[0] or abs(y - below) > _LABEL_SIZE[1] for left, below in taken):
            taken.append((x, y))
            axes.annotate(
                str(record.number), point, (0, 7), textcoords="offset points", ha="center", fontsize=8
            )
