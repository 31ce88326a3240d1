"""Take pictures of the latest search in the MLflow UI: its saved view, and the page of its knee.

python -m docs.screenshot          # after `make demo`; needs Debian's chromium and chromium-driver
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from mlflow import MlflowClient
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from autopeft.reporting.mlflow.run_content import KNEE_TAG
from autopeft.reporting.mlflow.saved_view import view_link
from autopeft.reporting.mlflow.server import find_fronts, mlflow_server
from autopeft.reporting.mlflow.store import checked_store
from tests.chromium import DRAWN_POINTS, open_chromium, wait_for

PICTURES = Path(__file__).parent / "images"
_SECONDS_TO_SETTLE = 4


def main() -> None:
    """Serve the store, open the pages, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking", default="sqlite:///mlflow.db")
    parser.add_argument("--to", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    uri, _ = checked_store(arguments.tracking)
    name, experiment_id, key = find_fronts(uri)[0]
    knees = MlflowClient(uri).search_runs([experiment_id], f"tags.`{KNEE_TAG}` = 'true'", max_results=1)
    arguments.to.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, mlflow_server(uri, 5137) as server:
        browser = open_chromium(Path(profile))
        try:
            browser.get(view_link(server.url, experiment_id, key))
            wait_for(browser, DRAWN_POINTS, lambda found: sum(plot["points"] > 0 for plot in found) >= 2)
            _save(browser, arguments.to / "mlflow_front.png")
            for run in knees:
                browser.get(f"{server.url}/#/experiments/{experiment_id}/runs/{run.info.run_id}")
                wait_for(browser, "return document.body.innerText", lambda text: "autopeft export" in text)
                browser.find_element(By.XPATH, "//button[contains(., 'Show more')]").click()
                _save(browser, arguments.to / "mlflow_trial.png")
        finally:
            browser.quit()
    print(f"{name}: {arguments.to}")


def _save(browser: Chrome, picture: Path) -> None:
    for button in ("Close", "Hide banner"):  # the assistant's panel, and a note on the view
        for found in browser.find_elements(By.CSS_SELECTOR, f"button[aria-label='{button}']"):
            found.click()
    time.sleep(_SECONDS_TO_SETTLE)  # the charts take the freed room
    browser.save_screenshot(str(picture))


if __name__ == "__main__":
    main()
