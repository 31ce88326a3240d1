"""The saved view and the front's page, in a real browser against a real MLflow server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from selenium.webdriver import Chrome

from autopeft.reporting.front_plots import FRONT_COLOUR, KNEE_COLOUR, OTHER_COLOUR
from autopeft.reporting.mlflow.server import mlflow_server
from autopeft.reporting.mlflow.tracker import MlflowTracker
from tests.chromium import DRAWN_POINTS, open_chromium, wait_for
from tests.records import IDENTITY, OBJECTIVES, front_of, pareto_front, synthetic_records

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    browser = open_chromium(tmp_path / "profile")
    yield browser
    browser.quit()


@pytest.mark.slow
def test_saved_view_shows_all_trials(browser: Chrome, tmp_path: Path) -> None:
    records = synthetic_records(40)
    complete = [record for record in records if record.evaluation.status == "complete"]
    members = front_of(records)
    knee = min(members)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with mlflow_server(uri, 5123) as server:
        tracker = MlflowTracker(
            uri,
            experiment="autopeft",
            search_name="shown",
            study_id="a",
            objectives=OBJECTIVES,
        )
        tracker.start(note="a search", identity=IDENTITY, records=())
        for record in records:
            tracker.trial_started(record.number, record.evaluation.configuration)
            tracker.progress({"hypervolume": 0.5, "cost/wall_seconds": 2.0 * record.number}, record.number)
            tracker.trial_finished(record)
        tracker.front_changed(members)
        tracker.knee_changed(knee)
        tracker.publish_front(pareto_front(records))
        tracker.finish("FINISHED", records)
        assert tracker.failures == 0

        browser.get(tracker.link.replace("http://127.0.0.1:5000", server.url))
        costs = {"log10_trainable_parameters", "log10_peak_memory"}
        charts = wait_for(
            browser,
            DRAWN_POINTS,
            lambda found: (
                costs <= {chart["x"] for chart in found if chart["points"] == len(complete)}
                and "search/wall_seconds" in {chart["x"] for chart in found}
            ),
        )
        # The front comes first, before the charts that the UI adds of its own.
        assert {chart["x"] for chart in charts[:2]} == costs
        assert {chart["y"] for chart in charts[:2]} == {"accuracy"}
        over_time = next(chart for chart in charts if chart["x"] == "search/wall_seconds")
        seconds = sorted(x for x, *_ in over_time["marks"])
        assert seconds == [2.0 * record.number for record in records]
        # Members of the front and its knee stand out, and each stands where its trial is.
        for chart, cost in ((chart, chart["x"].removeprefix("log10_")) for chart in charts[:2]):
            drawn: dict[str, set[tuple[float, float]]] = {}
            for x, y, colour in chart["marks"]:
                drawn.setdefault(colour.upper(), set()).add((round(x, 6), round(y, 6)))
            assert drawn.keys() == {FRONT_COLOUR, KNEE_COLOUR, OTHER_COLOUR}
            values = {number: records[number].evaluation.values for number in members}
            places = {
                number: (round(math.log10(at[cost]), 6), round(at["accuracy"], 6))
                for number, at in values.items()
            }
            assert drawn[KNEE_COLOUR] == {places.pop(knee)}
            assert drawn[FRONT_COLOUR] == set(places.values())

        # The page of a trial has its picture in the tab "Artifacts".
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("autopeft")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`autopeft.trial` = '{knee}'")
        place = f"{experiment.experiment_id}/runs/{runs[0].info.run_id}/artifacts/configuration.svg"
        browser.get(f"{server.url}/#/experiments/{place}")
        wide = "return Array.from(document.images).some(image => image.naturalWidth > 100)"
        wait_for(browser, wide, bool)


@pytest.mark.slow
def test_a_report_stands_alone(browser: Chrome, tmp_path: Path) -> None:
    records = synthetic_records(20)
    complete = sum(record.evaluation.status == "complete" for record in records)
    front = pareto_front(records, search="reviews")
    trained = {point.record.trained for point in front.thinned(3)}
    browser.get(front.report(tmp_path / "report", points=3).as_uri())
    drawn = "return document.querySelectorAll('#figure-{} .scatterlayer .point').length"
    wait_for(browser, drawn.format(0), lambda found: found == 2 * complete)
    # Four validations of a metric, and as many values of the training loss.
    wait_for(browser, drawn.format(1), lambda found: found == 8 * len(trained))
    assert "beats a uniform LoRA sweep" in browser.find_element("class name", "verdict").text
    pictures = browser.find_elements("css selector", ".point svg")
    assert len(pictures) == 3
    width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert width <= 0, "nothing sticks out to the side"
    requests = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
        ".filter(name => name.startsWith('http'))"
    )
    assert requests == []
