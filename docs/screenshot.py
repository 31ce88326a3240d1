"""Take the README's picture: the saved view of the latest search, as the MLflow UI shows it.

python -m docs.screenshot          # after `make demo`; needs Debian's chromium and chromium-driver
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from selenium.webdriver.common.by import By

from autopeft.reporting.mlflow.saved_view import view_link
from autopeft.reporting.mlflow.server import find_fronts, mlflow_server
from autopeft.reporting.mlflow.store import checked_store
from tests.chromium import DRAWN_POINTS, open_chromium, wait_for

PICTURE = Path(__file__).parent / "images" / "mlflow_front.png"
_SECONDS_TO_SETTLE = 4


def main() -> None:
    """Serve the store, open the latest search's view, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking", default="sqlite:///mlflow.db")
    parser.add_argument("--to", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    uri, _ = checked_store(arguments.tracking)
    name, experiment_id, key = find_fronts(uri)[0]
    with tempfile.TemporaryDirectory() as profile, mlflow_server(uri, 5137) as server:
        browser = open_chromium(Path(profile))
        try:
            browser.get(view_link(server.url, experiment_id, key))
            wait_for(browser, DRAWN_POINTS, lambda found: sum(plot["points"] > 0 for plot in found) >= 2)
            for button in ("Close", "Hide banner"):  # the assistant's panel, and a note on the view
                for found in browser.find_elements(By.CSS_SELECTOR, f"button[aria-label='{button}']"):
                    found.click()
            time.sleep(_SECONDS_TO_SETTLE)  # the charts take the freed room
            arguments.to.parent.mkdir(exist_ok=True)
            browser.save_screenshot(str(arguments.to))
        finally:
            browser.quit()
    print(f"{name}: {arguments.to}")


if __name__ == "__main__":
    main()
