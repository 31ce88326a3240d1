"""The saved view and the front's page, in a real browser against a real MLflow server."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import JavascriptException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By

from autopeft.plots import front_figure, save_front_html
from autopeft.server import MlflowServer
from autopeft.tracking import Tracker
from tests.records import IDENTITY, OBJECTIVES, front_of, synthetic_records

pytestmark = pytest.mark.browser
# Where the documentation's picture goes; written with AUTOPEFT_SCREENSHOTS=1 only.
SCREENSHOT = Path(__file__).parent.parent / "docs" / "images" / "mlflow_front.png"
# How many points each scatter chart on the page has drawn.
DRAWN_POINTS = """
return Array.from(document.querySelectorAll('.js-plotly-plot')).map(plot => ({
    x: plot.layout?.xaxis?.title?.text ?? plot.layout?.xaxis?.title,
    y: plot.layout?.yaxis?.title?.text ?? plot.layout?.yaxis?.title,
    points: (plot.data ?? []).reduce((sum, trace) => sum + (trace.x?.length ?? 0), 0),
}));
"""


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1600,1000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("needs chromedriver")
    browser = Chrome(options=options, service=ChromeService(executable_path=driver))
    yield browser
    browser.quit()


def wait_for(browser: Chrome, script: str, wanted: Callable[[Any], bool], seconds: float = 60) -> Any:
    """Run a script until its result is as wanted; fail with the last result."""
    deadline = time.monotonic() + seconds
    result: Any = None
    while time.monotonic() < deadline:
        try:
            result = browser.execute_script(script)
        except JavascriptException as error:
            result = error.msg
        else:
            if wanted(result):
                return result
        time.sleep(0.3)
    raise AssertionError(f"Not within {seconds} s; the last result was {result!r}")


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
            tracker.trial_started(record.number, record.evaluation.configuration)
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
        if os.environ.get("AUTOPEFT_SCREENSHOTS") == "1":
            SCREENSHOT.parent.mkdir(exist_ok=True)
            for button in ("Close", "Hide banner"):  # the assistant's panel, and a note on the view
                browser.find_element(By.CSS_SELECTOR, f"button[aria-label='{button}']").click()
            time.sleep(3)  # the charts take the freed room
            browser.save_screenshot(str(SCREENSHOT))


def test_front_page_stands_alone(browser: Chrome, tmp_path: Path) -> None:
    records = synthetic_records(20)
    complete = sum(record.evaluation.status == "complete" for record in records)
    page = tmp_path / "front.html"
    save_front_html(front_figure(records, [1, 2, 3], OBJECTIVES), page)
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
