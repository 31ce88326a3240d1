"""The page of a front: what it says, of which points, and that it needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from autopeft.core.evaluation import Evaluation, TrialRecord, with_replicate
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.front_page import curves_figure
from tests.records import OBJECTIVES, pareto_front, synthetic_records

VERDICT = "No better than a uniform LoRA sweep: take lora(8) everywhere."


def test_a_report_says_everything_of_the_front(tmp_path: Path) -> None:
    records = synthetic_records(30)
    front = pareto_front(records, verdict=VERDICT, search="my search", backbone="org/model")
    assert len(front) > 3
    path = front.report(tmp_path / "new" / "report", points=3)
    assert path == tmp_path / "new" / "report" / "report.html"
    page = path.read_text(encoding="utf-8")
    assert page.count(VERDICT) == 1
    assert f"Pareto front: {len(front)} of 30 trials, hypervolume {front.hypervolume:.4f}" in page
    assert f"Points of the front: 3 of {len(front)}" in page
    shown = [point.number for point in front.thinned(3)]
    assert [int(number) for number in re.findall(r"<h3>trial (\d+)", page)] == shown
    assert len(re.findall(rf"<h3>trial {front.knee().number}[^<]* · the knee: ", page)) == 1
    assert page.count("the knee: ") == 1
    for point in front.thinned(3):
        assert configuration_svg(point.configuration) in page
        assert (
            f"autopeft export {point.number} --search &#x27;my search&#x27; --to adapters/{point.number}"
            in page
        )
        assert f"model = autopeft.load_adapter(base, &#x27;adapters/{point.number}&#x27;)" in page
    assert page.count("base = &#x27;org/model&#x27;") == 3
    for point in front:
        assert f"<tr><td>{point.number}</td><td>{point.record.evaluation.format(OBJECTIVES[0])}</td>" in page
    assert page.count("Plotly.newPlot(") == 2
    assert len(re.findall(r"/\*\*\n\* plotly.js v", page)) == 1, "its script is there once"
    assert 'src="http' not in page
    assert page == front.to_html(3), "nothing random"


def test_a_report_says_what_was_spent() -> None:
    records = synthetic_records(20)
    cut = replace(records[3].evaluation, values={**records[3].evaluation.values, "trainable_parameters": 2.0})
    records[3] = replace(records[3], evaluation=replace(records[3].evaluation, derived=(cut,)))
    duplicate = TrialRecord(number=20, evaluation=records[1].evaluation, duplicate_of=1)
    page = pareto_front([*records, duplicate]).to_html()
    whole = [record.evaluation for record in records if record.evaluation.status == "complete"]
    seconds = sum(evaluation.cost.wall_seconds for evaluation in whole)
    rows = {
        "trials": f"21: {len(whole) + 1} complete, 1 failed, 1 infeasible",
        "points cut from them": "1",
        "trainings": str(len(whole)),
        "wall seconds": f"{seconds:,.0f}",
        "steps": str(40 * len(whole)),
    }
    for what, much in rows.items():
        assert f"<tr><td>{what}</td><td>{much}</td></tr>" in page, what


def test_learning_curves_have_a_line_for_each_training() -> None:
    first, second = synthetic_records(3)[1:]
    twice = with_replicate(first.evaluation, replace(second.evaluation, seed=1), {"accuracy": 0.0})
    figure = curves_figure([replace(first, evaluation=twice), second], OBJECTIVES[0])
    lines = [(line.name, line.yaxis, line.opacity, line.showlegend) for line in figure.data]
    trained_twice, once = "trial 1 · uniform lora 8", "trial 2"
    assert lines == [
        (trained_twice, "y", 1.0, True),
        (trained_twice, "y", 0.5, False),
        (trained_twice, "y2", 1.0, False),
        (trained_twice, "y2", 0.5, False),
        (once, "y", 1.0, True),
        (once, "y2", 1.0, False),
    ]
    assert list(figure.data[1].y) == [
        point.value for (curve,) in [second.evaluation.curves_of("accuracy")] for point in curve
    ]


def test_a_cut_has_the_curve_of_its_training() -> None:
    record = synthetic_records(3)[2]
    cheap = {**record.evaluation.values, "trainable_parameters": 1.0}
    derived = (replace(record.evaluation, values=cheap, curves=()),)
    front = pareto_front([replace(record, evaluation=replace(record.evaluation, derived=derived))])
    page = front.to_html()
    assert "<h3>trial 100002 · cut from trial 2" in page
    assert '"name":"trial 2"' in page


@pytest.mark.parametrize("count", [0, 1])
def test_a_front_without_points_has_a_report(count: int, tmp_path: Path) -> None:
    failed = Evaluation(configuration=synthetic_records(3)[2].evaluation.configuration, status="failed")
    page = pareto_front([TrialRecord(number=0, evaluation=failed)] * count).report(tmp_path).read_text()
    assert f"0 of {count} trials" in page
    assert "<h3>" not in page


def test_a_report_of_no_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="points is a whole number from 1 up, got 0"):
        pareto_front(synthetic_records(9)).report(tmp_path / "report", points=0)
    assert not (tmp_path / "report").exists()
