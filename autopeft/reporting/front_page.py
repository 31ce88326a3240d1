"""A page of a front, which a browser shows without a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict
from html import escape

from plotly import graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots
from rich.table import Table

from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.tables import html_table, titled_table
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.formats import how_to_load, html_page, outcome_line
from autopeft.reporting.front_plots import front_figure, projections, trial_name

_COLOURS = qualitative.Safe  # which people with any colour vision can tell apart
_STYLE = """
body { max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem }
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
.verdict { font-weight: 600; border-left: 4px solid #D55E00; padding-left: 0.8rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: left; border-bottom: 1px solid #eee }
.point { display: flex; flex-wrap: wrap; gap: 2rem }
.point > * { overflow: auto; max-height: 66rem; max-width: 100% }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; margin: 0.3rem 0 }
"""


def front_page(
    records: Sequence[TrialRecord],
    members: Collection[int],
    shown: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    *,
    table: Table,
    knee: int | None,
    search: str,
    backbone: str,
) -> str:
    """Return a page with a front, its verdict, some of its points, and what was spent.

    Args:
        records: All trials, and the points derived from them.
        members: Numbers of those on the front.
        shown: The points of which the page has configuration, learning curves and how they are loaded.
        objectives: The search's objectives.
        table: The front as a table; its caption is the verdict.
        knee: Number of the front's knee point; None of an empty front.
        search: Name of the search.
        backbone: The backbone's hub name, or that of its folder.
    """
    _, metric = projections(objectives)[0]
    trials = {record.number: record for record in records}
    trained = [trials[number] for number in dict.fromkeys(record.trained for record in shown)]
    marks = {knee: " · the knee: cheapest with almost the best metric"}
    of_all = "" if len(shown) == len(members) else f": {len(shown)} of {len(members)}"
    return html_page(
        f"<h1>{escape(search)}</h1><p>{escape(str(table.title))}</p>",
        f'<p class="verdict">{escape(str(table.caption or ""))}</p>',
        front_figure(records, members, objectives),
        f"<h2>The front</h2>{html_table(table)}",
        f"<h2>Points of the front{of_all}</h2>",
        *(
            f"<h3>{escape(trial_name(record))}{marks.get(record.number, '')}</h3>"
            f"<p>{escape(outcome_line(record, objectives))}</p>{_use(record, search, backbone)}"
            for record in shown
        ),
        "<h2>Learning curves</h2>",
        curves_figure(trained, metric),
        f"<h2>What was spent</h2>{html_table(_spent(records))}",
        title=f"Pareto front of {search}",
        style=_STYLE,
    )


def _use(record: TrialRecord, search: str, backbone: str) -> str:
    """Return a point's configuration as a picture, and beside it how it is exported and loaded."""
    shell, python = (escape(text) for text in how_to_load(record.number, search, backbone))
    return f"""<div class="point"><div>{configuration_svg(record.evaluation.configuration)}</div>
<div>Export it:<pre>{shell}</pre>Load what was exported:<pre>{python}</pre></div></div>"""


def curves_figure(trials: Sequence[TrialRecord], metric: Objective) -> go.Figure:
    """Draw the learning curves of trials: a metric and the training loss, with a line for each training."""
    names = (metric.name, "training_loss")
    figure = make_subplots(rows=1, cols=len(names), horizontal_spacing=0.09)
    for place, record in enumerate(trials):
        for column, name in enumerate(names, start=1):
            for training, points in enumerate(record.evaluation.curves_of(name)):
                figure.add_scatter(
                    x=[point.step for point in points],
                    y=[point.value for point in points],
                    mode="lines+markers",
                    line={"color": _COLOURS[place % len(_COLOURS)], "width": 1.5},
                    opacity=0.5 if training else 1.0,
                    name=escape(trial_name(record)),
                    legendgroup=str(record.number),
                    showlegend=column == 1 and training == 0,
                    row=1,
                    col=column,
                )
    for column, name in enumerate(names, start=1):
        figure.update_yaxes(title=escape(name.replace("_", " ")), row=1, col=column)
    figure.update_xaxes(title="optimizer step")
    return figure.update_layout(template="plotly_white", height=440, margin={"t": 30})


def _spent(records: Sequence[TrialRecord]) -> Table:
    """Return what the trials took; a duplicate took nothing, and a derived point is in its trial's cost."""
    trials = [record for record in records if record.derived_from is None]
    trained = [record.evaluation for record in trials if record.duplicate_of is None]
    counts = Counter(record.evaluation.status for record in trials)
    statuses = ", ".join(f"{count} {status}" for status, count in counts.items())
    table = titled_table("What was spent", ("what", "how much"), words=())
    table.add_row("trials", f"{len(trials)}: {statuses}")
    table.add_row("points cut from them", str(len(records) - len(trials)))
    table.add_row("trainings", str(sum(each.trainings for each in trained if each.cost.steps)))
    for name, value in asdict(Cost.total([each.cost for each in trained])).items():
        table.add_row(name.replace("_", " "), f"{value:,.0f}")
    return table
