"""Searches with equal settings from several folders on one MLflow store, each with runs of its own."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from mlflow import MlflowClient

from autopeft.reporting.mlflow.server import mlflow_server
from tests.learnable import tiny_search

TRIALS = 2


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.slow), "http"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with nullcontext() if request.param == "sqlite" else mlflow_server(store, 5131) as server:
        yield store if server is None else server.url


def run_search(folder: Path, uri: str) -> None:
    search = tiny_search(folder, tracking=uri, name="same", score_check=False)
    assert len(search.run(trials=TRIALS, progress=False).records) == TRIALS


def finished_trials(uri: str) -> Counter[str]:
    """Count the finished runs of trials below each search's run."""
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`autopeft.trial` LIKE '%'")
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}
    return Counter(run.data.tags["mlflow.parentRunId"] for run in runs)


@pytest.mark.slow
def test_searches_with_equal_settings_keep_their_runs(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    run_search(tmp_path / "first", uri)
    assert list(finished_trials(uri).values()) == [TRIALS]
    other = multiprocessing.get_context("spawn").Process(target=run_search, args=(tmp_path / "second", uri))
    other.start()  # at once with the third
    run_search(tmp_path / "third", uri)
    other.join(240)
    assert other.exitcode == 0
    assert list(finished_trials(uri).values()) == [TRIALS] * 3
    run_search(tmp_path / "first", uri)  # goes on with its own run, with nothing to do
    assert list(finished_trials(uri).values()) == [TRIALS] * 3
