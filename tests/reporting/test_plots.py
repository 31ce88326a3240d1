"""The pictures and tables of a front."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Status, TrialRecord
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.formats import html_page
from autopeft.reporting.frame import front_frame
from autopeft.reporting.front_plots import front_figure, projections, static_front_figure
from tests.records import METRICS, OBJECTIVES, front_of, synthetic_records

TWO = OBJECTIVES[:2]


def with_values(record: TrialRecord, **values: float) -> TrialRecord:
    evaluation = record.evaluation
    return replace(record, evaluation=replace(evaluation, values={**evaluation.values, **values}))


@pytest.mark.parametrize("objectives", [OBJECTIVES, TWO, OBJECTIVES[::-1]])
def test_the_first_metric_goes_up_against_each_other_objective(
    objectives: tuple[Objective, ...],
) -> None:
    others = [objective.name for objective in objectives if objective.name != "accuracy"]
    assert [(x.name, y.name) for x, y in projections(objectives)] == [(name, "accuracy") for name in others]


def test_the_table_has_a_row_a_trial() -> None:
    records = synthetic_records(20)
    members = front_of(records)
    frame = front_frame(records[::-1], members, OBJECTIVES)
    assert list(frame["trial"]) == list(range(20))
    assert set(frame["trial"][frame["front"]]) == members
    assert frame["accuracy"].isna().sum() == 2
    assert frame["reason"].notna().sum() == 2
    assert frame["lowest_block"].isna().sum() == 1  # the head alone
    assert list(front_frame([], set(), OBJECTIVES).columns) == list(frame.columns)


def test_the_figure_shows_every_completed_trial_in_each_panel() -> None:
    records = synthetic_records(40)
    members = front_of(records)
    figure = front_figure(records, members, OBJECTIVES)
    complete = sum(record.evaluation.status == "complete" for record in records)
    for kind, panels in (("scatter", 2), ("scatter3d", 1)):
        traces = [trace for trace in figure.data if trace.type == kind and trace.mode == "markers"]
        assert sum(len(trace.x) for trace in traces) == panels * complete
        assert sum(len(trace.x) for trace in traces if trace.name == "front") == panels * len(members)
    assert figure.layout.xaxis2.title.text == "peak memory (MiB)"
    assert figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
    assert figure.layout.yaxis.type is None
    memory = next(trace for trace in figure.data if trace.name == "front" and trace.xaxis == "x2")
    assert 300 < min(memory.x) < max(memory.x) < 2000


def test_two_objectives_have_no_third_dimension() -> None:
    figure = front_figure(synthetic_records(10), [1], TWO)
    assert {trace.type for trace in figure.data} == {"scatter"}


def test_pointing_at_a_trial_shows_its_configuration() -> None:
    record = replace(synthetic_records(2)[1], baseline="<uniform> lora 8")
    (text,) = next(
        trace.text for trace in front_figure([record], [1], OBJECTIVES).data if trace.name == "front"
    )
    assert text.startswith("<b>trial 1 · &lt;uniform&gt; lora 8</b><br>accuracy 0.")
    assert "MiB" in text
    for line in record.evaluation.configuration.grid().splitlines():
        assert f"<br>{line}" in text


def test_the_stairs_never_go_down() -> None:
    records = synthetic_records(60)
    for panel in front_figure(records, front_of(records), OBJECTIVES).data:
        if panel.mode == "lines":
            assert list(panel.x) == sorted(panel.x)
            assert list(panel.y) == sorted(panel.y)


@pytest.mark.parametrize(
    ("low", "high"), [(100.0, 100.0), (894.0, 1755.0), (1e3, 5e6), (1e-4, 2e-4), (1.0, 1e12)]
)
def test_logarithmic_axes_have_a_few_round_ticks(low: float, high: float) -> None:
    first = synthetic_records(1)[0]
    records = [
        with_values(replace(first, number=number), trainable_parameters=value)
        for number, value in enumerate((low, high))
    ]
    axis = front_figure(records, [0], TWO).layout.xaxis
    assert 3 <= len(axis.tickvals) <= 12
    assert all(low / 1.03 <= tick <= high * 1.03 for tick in axis.tickvals)
    assert len(set(axis.ticktext)) == len(axis.ticktext)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    records = synthetic_records(4)
    records[1] = with_values(records[1], accuracy=math.nan)
    records[2] = with_values(records[2], trainable_parameters=0.0)
    figure = front_figure(records, [0, 1, 2, 3], TWO)
    assert sum(len(trace.x) for trace in figure.data if trace.mode == "markers") == 2
    assert figure.layout.title.text == "3 complete, 3 on the front"


def test_the_title_tells_what_was_stopped_from_what_failed() -> None:
    records = synthetic_records(6)
    statuses: list[Status] = ["paused", "paused", "failed", "complete", "complete", "complete"]
    for number, status in enumerate(statuses):
        evaluation = replace(records[number].evaluation, status=status)
        records[number] = replace(records[number], evaluation=evaluation)
    title = front_figure(records, [3], TWO).layout.title.text
    assert title == "3 complete, 1 on the front; 2 stopped early; 1 failed"


def test_what_has_no_parameters_is_a_line_at_its_metric() -> None:
    records = synthetic_records(6)
    untrained = with_values(replace(records[0], baseline="untrained model"), trainable_parameters=0.0)
    records[0] = untrained
    accuracy = untrained.evaluation.values["accuracy"]
    figure = front_figure(records, [0, 1], OBJECTIVES)
    lines = [trace for trace in figure.data if trace.name == "trial 0 · untrained model"]
    assert [(line.mode, set(line.y), line.xaxis) for line in lines] == [
        ("lines", {accuracy}, "x"),
        ("lines", {accuracy}, "x2"),
    ]
    assert lines[0].x[0] > 0
    assert "6 complete, 2 on the front" in figure.layout.title.text
    panels = static_front_figure(records, [0, 1], OBJECTIVES).axes
    for panel in panels:
        assert [
            np.asarray(line.get_ydata()).tolist() for line in panel.lines if line.get_label() == lines[0].name
        ] == [[accuracy, accuracy]]
    assert not any(
        "untrained" in str(trace.name) for trace in front_figure(records[:1], [0], OBJECTIVES).data
    )


@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize("objectives", [TWO, OBJECTIVES])
def test_the_picture_is_a_png_of_a_panel_a_cost(count: int, objectives: tuple[Objective, ...]) -> None:
    records = synthetic_records(count)
    figure = static_front_figure(records, front_of(records), objectives)
    figure.savefig(io.BytesIO(), format="png")
    assert len(figure.axes) == len(objectives) - 1
    assert figure.bbox.width > 600 * (len(objectives) - 1)


def test_seconds_and_scores_have_their_axes() -> None:
    objectives = resolve_objectives(("accuracy", "f1_macro", "training_seconds"), METRICS)
    records = [
        with_values(synthetic_record, training_seconds=3.0 + synthetic_record.number)
        for synthetic_record in synthetic_records(9)
    ]
    layout = front_figure(records, front_of(records, objectives), objectives).layout
    assert layout.xaxis.title.text == "f1 macro"
    assert layout.xaxis.type is None
    assert layout.xaxis2.title.text == "training seconds (s)"


def test_the_page_holds_all_it_needs() -> None:
    page = html_page(front_figure(synthetic_records(5), [1], OBJECTIVES), title="3 < 4")
    assert len(page) > 3e6  # plotly itself
    assert 'src="http' not in page
    assert "<title>3 &lt; 4</title>" in page
    assert json.dumps("peak memory (MiB)") in page


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration({}),
        Configuration({Site(0, "query"): Adapter("lora", 8)}),
        Configuration({Site(47, "attention"): (Adapter("series", 1024), Adapter("prefix", 200))}),
    ],
)
def test_the_picture_of_a_configuration_has_a_row_a_block(configuration: Configuration) -> None:
    picture = ElementTree.fromstring(configuration_svg(configuration))
    texts = set(picture.itertext())
    blocks = 0 if not configuration.adapters else 1 + max(site.block for site in configuration.adapters)
    assert {text for text in texts if text.startswith("block")} == {f"block {n}" for n in range(blocks)}
    assert texts >= set(configuration.cells().values())
    assert int(picture.attrib["height"]) == 30 * (blocks + 3)
