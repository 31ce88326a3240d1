"""The saved view as text; tests/reporting/test_browser.py opens it."""

from __future__ import annotations

import base64
import json
import logging
import zlib
from pathlib import Path

import pytest
from mlflow import MlflowClient

from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.reporting.mlflow.saved_view import save_view, valid_key, view_link, view_state
from tests.records import OBJECTIVES


@pytest.fixture
def client(tmp_path: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_view_has_a_chart_a_cost_of_all_trials_of_the_search() -> None:
    state = json.loads(view_state("abc", OBJECTIVES))
    charts = [(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in state["compareRunCharts"]]
    assert charts == [
        ("log10_trainable_parameters", "accuracy"),
        ("log10_peak_memory", "accuracy"),
        ("search/wall_seconds", "search/hypervolume"),
    ]
    assert "'abc'" in state["searchFilter"]
    assert state["runsHiddenMode"] == "SHOW_ALL"
    assert {"metrics.`accuracy_std`", "tags.`autopeft.knee`"} <= set(state["selectedColumns"])
    assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == 3


def test_a_view_names_metrics_as_they_are_logged() -> None:
    objectives = resolve_objectives(("trainable_parameters", "F1@5"), (Objective.score("F1@5"),))
    state = json.loads(view_state("abc", objectives))
    assert valid_key("F1@5") == "F1_5"
    assert state["compareRunCharts"][0]["yaxis"]["key"] == "F1_5"
    assert state["orderByKey"] == "metrics.`F1_5`"
    assert valid_key("eval/f1 macro-0.5:x_1") == "eval/f1 macro-0.5:x_1"


def test_a_saved_view_is_a_tag_that_the_link_names(client: MlflowClient) -> None:
    experiment = client.create_experiment("one")
    state = view_state("abc", OBJECTIVES)
    key = save_view(client, experiment, state)
    assert key is not None
    assert save_view(client, experiment, state) == key  # resuming does not pile up views
    tags = client.get_experiment(experiment).tags
    packed = tags[f"mlflow.sharedViewState.{key}"].removeprefix("deflate;")
    assert zlib.decompress(base64.b64decode(packed)).decode() == state
    link = view_link("http://127.0.0.1:5000/", experiment, key)
    assert link.startswith(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?viewStateShareKey={key}&")


def test_a_view_that_cannot_be_saved_costs_the_link_alone(
    client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="autopeft"):
        assert save_view(client, "999", view_state("abc", OBJECTIVES)) is None
    assert "could not be saved" in caplog.text
    link = view_link("http://127.0.0.1:5000", "7", None)
    assert link == "http://127.0.0.1:5000/#/experiments/7/runs?compareRunsMode=CHART"
