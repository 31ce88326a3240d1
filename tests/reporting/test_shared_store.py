"""Searches with equal settings from several folders on one MLflow store, each with runs of its own."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from autopeft.reporting.mlflow.server import mlflow_server
from tests.learnable import tiny_search
from tests.postgresql import postgresql_server

TRIALS = 2


@pytest.fixture(params=["SQLite", "server on SQLite", "server on PostgreSQL"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        store = f"sqlite:///{tmp_path / 'mlflow.db'}"
        if request.param.endswith("PostgreSQL"):
            store = stack.enter_context(postgresql_server())
        is_served = request.param.startswith("server")
        yield stack.enter_context(mlflow_server(store, 5131)).url if is_served else store


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
