"""The saved view and the front's page, in a real browser against a real MLflow server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from autopeft.reporting.front_plots import front_figure
from autopeft.reporting.html_page import save_html_page
from autopeft.reporting.mlflow.server import MlflowServer
from autopeft.reporting.mlflow.tracker import Tracker
from tests.chromium import DRAWN_POINTS, open_chromium, wait_for
from tests.records import IDENTITY, OBJECTIVES, front_of, synthetic_records

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    browser = open_chromium(tmp_path / "profile")
    yield browser
    browser.quit()


def test_saved_view_shows_all_trials(browser: Chrome, tmp_path: Path) -> None:
    records = synthetic_records(40)
    complete = [record for record in records if record.evaluation.status == "complete"]
    members = front_of(records)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with MlflowServer(uri, 5123) as server:
        tracker = Tracker(
            uri, experiment="autopeft", search_name="shown", objectives=OBJECTIVES, ui_url=server.url
        )
        tracker.start(note="a search", identity=IDENTITY, records=())
        for record in records:
            tracker.trials_started({record.number: record.evaluation.configuration})
            tracker.trial_finished(record)
        tracker.front_changed(members)
        tracker.publish_front(records, members)
        tracker.finish("FINISHED", records)
        assert tracker.failures == 0

        browser.get(tracker.link)
        costs = {"trainable_parameters", "peak_memory"}
        charts = wait_for(
            browser,
            DRAWN_POINTS,
            lambda found: costs <= {one["x"] for one in found if one["points"] == len(complete)},
        )
        # The front comes first, before the charts that the UI adds of its own.
        assert {one["x"] for one in charts[:2]} == costs
        assert {one["y"] for one in charts[:2]} == {"accuracy"}


def test_front_page_stands_alone(browser: Chrome, tmp_path: Path) -> None:
    records = synthetic_records(20)
    complete = sum(record.evaluation.status == "complete" for record in records)
    page = tmp_path / "front.html"
    save_html_page(front_figure(records, [1, 2, 3], OBJECTIVES), page, title="Pareto front")
    browser.get(page.as_uri())
    wait_for(
        browser,
        "return document.querySelectorAll('.scatterlayer .point').length",
        lambda found: found == 2 * complete,
    )
    requests = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
        ".filter(name => name.startsWith('http'))"
    )
    assert requests == []
