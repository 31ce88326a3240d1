"""A headless Chromium, and what the MLflow page has drawn in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium.common.exceptions import JavascriptException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

# What each chart on the page has drawn: axes, number of points, and of each its place and colour.
DRAWN_POINTS = """
return Array.from(document.querySelectorAll('.js-plotly-plot')).map(plot => ({
    x: plot.layout?.xaxis?.title?.text ?? plot.layout?.xaxis?.title,
    y: plot.layout?.yaxis?.title?.text ?? plot.layout?.yaxis?.title,
    points: (plot.data ?? []).reduce((sum, trace) => sum + (trace.x?.length ?? 0), 0),
    marks: (plot.data ?? []).flatMap(trace =>
        Array.from(trace.x ?? [], (x, index) => [x, trace.y?.[index], trace.marker?.color?.[index]])),
}));
"""


def open_chromium(profile: Path) -> Chrome:
    """Start Debian's Chromium with a profile of its own.

    Raises:
        RuntimeError: chromedriver is not installed.
    """
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
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    driver = shutil.which("chromedriver")
    if driver is None:
        raise RuntimeError("chromedriver is not installed.")
    return Chrome(options=options, service=ChromeService(executable_path=driver))


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
