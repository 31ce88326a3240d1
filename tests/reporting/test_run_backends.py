"""Runs written straight to MLflow's database against those its client writes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from autopeft.reporting.mlflow import run_backends as trial_runs
from autopeft.reporting.mlflow.run_backends import ClientRuns, DatabaseRuns, FinishedRun, TrialRuns
from autopeft.reporting.mlflow.run_content import finished_run, started_run
from autopeft.reporting.mlflow.store import checked_store, open_experiment
from tests.records import synthetic_records

NOW = int(1000 * time.time())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[MlflowClient, str]:
    uri, artifacts = checked_store(f"sqlite:///{tmp_path_factory.mktemp('runs') / 'mlflow.db'}")
    return open_experiment(uri, artifacts, "runs")


def writers(store: tuple[MlflowClient, str]) -> tuple[TrialRuns, TrialRuns]:
    database = DatabaseRuns.of(*store)
    assert database is not None
    return ClientRuns(*store), database


def contents(number: int = 5) -> FinishedRun:
    metrics = [
        Metric("steps", 0.5, 1000, 10),
        Metric("steps", 0.7, 1000, 20),
        Metric("steps", 0.6, 1000, 15),
        Metric("steps", 0.6, 1000, 15),  # the very same
        Metric("twice", 0.7, 2000, 0),
        Metric("twice", 0.8, 2000, 0),
    ]
    record = synthetic_records(number + 1)[number]
    run = finished_run("parent", record, on_front=True, ended=NOW)
    return replace(run, metrics=[*run.metrics, *metrics])


def described(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """Return all of a run but what differs between two of the same content."""
    run: Run = client.get_run(run_id)
    found = {key: value for key, value in dict(run.info).items() if key not in ("run_id", "run_uuid")}
    place = str(found.pop("artifact_uri"))
    assert place.endswith(f"/{run_id}/artifacts")
    assert int(found.pop("end_time") or 0) >= int(found.pop("start_time")) > 1.7e12
    histories = {
        name: sorted((one.step, one.timestamp, one.value) for one in client.get_metric_history(run_id, name))
        for name in run.data.metrics
    }
    artifacts = {
        one.path: (Path(place.removeprefix("file://")) / one.path).read_bytes()
        for one in client.list_artifacts(run_id)
    }
    return {**found, **run.data.to_dictionary(), "histories": histories, "artifacts": artifacts}


@pytest.mark.parametrize("started", [True, False])
def test_a_run_is_the_one_the_client_writes(store: tuple[MlflowClient, str], started: bool) -> None:
    run, client = contents(), store[0]
    found = []
    for writer in writers(store):
        first = (
            writer.start(run.name, {**run.tags, "autopeft.pareto": "false"}, started=NOW) if started else None
        )
        if first is not None:
            assert client.get_run(first).info.status == "RUNNING"
        run_id = writer.finish([(first, run)])[0]
        assert first in (None, run_id)
        found.append(described(client, run_id))
    assert found[0] == found[1]
    assert found[1]["status"] == run.status
    assert found[1]["tags"]["autopeft.pareto"] == "true"
    assert found[1]["metrics"]["steps"] == 0.7
    assert found[1]["metrics"]["twice"] == 0.8
    assert set(found[1]["artifacts"]) == {"configuration.yaml", "configuration.png"}


def test_a_run_that_was_paused_goes_on(store: tuple[MlflowClient, str]) -> None:
    run, client = contents(), store[0]
    later = replace(
        run,
        status="FINISHED",
        tags={**run.tags, "autopeft.optimization.successive_halving": "1.0"},
        metrics=[Metric("steps", 0.9, 3000, 30), Metric("twice", 0.2, 2500, 0), Metric("new", 1.0, 3000, 0)],
    )
    found = []
    for writer in writers(store):
        run_id = writer.finish([(None, replace(run, status="SCHEDULED"))])[0]
        assert client.get_run(run_id).info.status == "SCHEDULED"
        assert writer.finish([(run_id, later)]) == [run_id]
        found.append(described(client, run_id))
    assert found[0] == found[1]
    assert len(found[1]["histories"]["steps"]) == 4
    assert (found[1]["metrics"]["steps"], found[1]["metrics"]["twice"]) == (0.9, 0.2)


def test_a_run_that_is_shown_as_running_is_the_clients(store: tuple[MlflowClient, str]) -> None:
    name, tags = started_run("parent", 3, synthetic_records(4)[3].evaluation.configuration)
    runs = [store[0].get_run(writer.start(name, tags, started=NOW - 5000)) for writer in writers(store)]
    assert runs[0].data.to_dictionary() == runs[1].data.to_dictionary()
    assert [run.info.status for run in runs] == ["RUNNING", "RUNNING"]
    assert [run.info.end_time for run in runs] == [None, None]
    assert [run.info.start_time for run in runs] == [NOW - 5000, NOW - 5000]
    assert runs[1].info.run_name == name


def test_tags_change_in_the_runs_named_alone(store: tuple[MlflowClient, str]) -> None:
    client = store[0]
    for writer in writers(store):
        tags = {"front": "false", "other": "x"}
        first, second, third = (writer.start("trial", tags, started=NOW) for _ in range(3))
        writer.mark("front", {first: "true", third: "maybe"})
        writer.mark("front", {})
        found = [client.get_run(run_id).data.tags for run_id in (first, second, third)]
        assert [one["front"] for one in found] == ["true", "false", "maybe"]
        assert {one["other"] for one in found} == {"x"}


def test_metrics_are_added_to_a_run_that_is_there(store: tuple[MlflowClient, str]) -> None:
    client, found = store[0], []
    first = [Metric("volume", 0.1 * step, NOW, step) for step in range(3)]
    later = [Metric("volume", 0.5, NOW + 1, 3), Metric("size", 4.0, NOW, 3), Metric("size", 4.0, NOW, 3)]
    for writer in writers(store):
        run_id = writer.start("search", {"kept": "yes"}, started=NOW)
        for metrics in (first, later, later, []):
            writer.add_metrics(run_id, metrics)
        run = client.get_run(run_id)
        assert (run.info.status, run.data.metrics) == ("RUNNING", {"volume": 0.5, "size": 4.0})
        found.append([client.get_metric_history(run_id, name) for name in ("volume", "size")])
        client.delete_run(run_id)
        with pytest.raises(MlflowException):
            writer.add_metrics(run_id, first)
    assert [[dict(one) for one in of] for of in found[0]] == [[dict(one) for one in of] for of in found[1]]
    assert len(found[1][0]) == 4


def test_a_run_without_metrics_and_parameters(store: tuple[MlflowClient, str]) -> None:
    empty = replace(contents(), metrics=[], params={})
    for writer in writers(store):
        run = store[0].get_run(writer.finish([(None, empty)])[0])
        assert (run.data.metrics, run.data.params, run.info.status) == ({}, {}, empty.status)


def test_a_run_that_cannot_be_written_leaves_nothing(store: tuple[MlflowClient, str]) -> None:
    client, experiment = store
    database = writers(store)[1]
    before = len(client.search_runs([experiment], max_results=1000))
    broken = replace(contents(), params={"": None})  # type: ignore[dict-item]
    with pytest.raises(MlflowException):
        database.finish([(None, contents()), (None, broken)])
    assert len(client.search_runs([experiment], max_results=1000)) == before


def test_a_run_that_was_deleted_while_its_trial_ran(store: tuple[MlflowClient, str]) -> None:
    database = writers(store)[1]
    run_id = database.start("trial", {"a": "b"}, started=NOW)
    store[0].delete_run(run_id)
    with pytest.raises(MlflowException, match="was deleted while its trial was running"):
        database.finish([(run_id, contents())])
    assert store[0].get_run(run_id).data.metrics == {}


def test_servers_and_tables_of_another_make_are_left_to_the_client(
    store: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DatabaseRuns.of(MlflowClient(tracking_uri="http://127.0.0.1:1"), "0") is None
    row = trial_runs._run_row
    monkeypatch.setattr(trial_runs, "_run_row", lambda *values: {**row(*values), "unheard_of": 1})
    assert DatabaseRuns.of(*store) is None
