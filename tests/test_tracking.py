"""Tracking against real MLflow stores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autopeft.evaluation import CurvePoint, Evaluation, TrialRecord
from autopeft.run_writer import shortened
from autopeft.tracking import Tracker
from tests.records import IDENTITY, OBJECTIVES, synthetic_records


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def make(uri: str, name: str = "one") -> Tracker:
    return Tracker(uri, experiment="autopeft", search_name=name, objectives=OBJECTIVES)


def trial_runs(uri: str, name: str = "one") -> list[Run]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], f"tags.`autopeft.search` = '{name}'")
    runs = client.search_runs(
        [experiment.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        max_results=1000,
    )
    return sorted(runs, key=lambda run: int(run.data.tags["autopeft.trial"]))


def numbers(runs: list[Run]) -> list[int]:
    return [int(run.data.tags["autopeft.trial"]) for run in runs]


def track(uri: str, records: list[TrialRecord], members: list[int]) -> Tracker:
    tracker = make(uri)
    tracker.start(note="a search", identity=IDENTITY, records=())
    for record in records:
        tracker.trial_started(record.number, record.evaluation.configuration)
        tracker.trial_finished(record)
        tracker.progress({"hypervolume": 0.1 * record.number}, step=record.number)
    tracker.front_changed(members)
    tracker.publish_front(records, members)
    tracker.finish("FINISHED", records)
    assert tracker.failures == 0
    return tracker


def test_a_trial_is_a_run_with_everything(uri: str) -> None:
    records = synthetic_records(12)
    track(uri, records, [0, 3])
    runs = trial_runs(uri)
    assert numbers(runs) == list(range(12))
    ends = {"complete": "FINISHED", "failed": "FAILED", "infeasible": "KILLED"}
    for record, run in zip(records, runs, strict=True):
        evaluation = record.evaluation
        assert run.info.status == ends[evaluation.status]
        for name, value in evaluation.values.items():
            assert run.data.metrics[name] == pytest.approx(value)
        assert run.data.params["configuration_key"] == evaluation.configuration.key
        assert run.data.tags["autopeft.pareto"] == str(record.number in (0, 3)).lower()
        assert run.data.tags.get("autopeft.reason") == evaluation.reason
        names = {one.path for one in MlflowClient(tracking_uri=uri).list_artifacts(run.info.run_id)}
        assert names == {"configuration.yaml", "configuration.png"}


def test_the_search_is_a_run_with_the_front(uri: str) -> None:
    records = synthetic_records(12)
    track(uri, records, [0, 3])
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(trial_runs(uri)[0].data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED"
    names = {one.path for one in client.list_artifacts(parent.info.run_id, "pareto")}
    assert {"pareto/front.html", "pareto/front.png", "pareto/front.csv"} <= names
    assert "Pareto front: 2 of 12" in parent.data.tags["mlflow.note.content"]
    assert parent.data.params["backbone.name"] == IDENTITY["backbone"]["name"]
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert [one.step for one in history] == list(range(12))
    assert parent.inputs is not None
    assert parent.inputs.dataset_inputs


def test_front_tags_follow_the_front(uri: str) -> None:
    records = synthetic_records(6)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=records)
    for members in ([0, 1], [1, 2], [2]):
        tracker.front_changed(members)
        tracker.flush()
        tagged = [run for run in trial_runs(uri) if run.data.tags["autopeft.pareto"] == "true"]
        assert numbers(tagged) == members
    tracker.finish("KILLED")


def test_resuming_brings_runs_in_line_with_the_study(uri: str) -> None:
    records = synthetic_records(8)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=records[:3])
    tracker.trial_started(3, records[3].evaluation.configuration)  # killed while it runs
    tracker.trial_finished(records[4])  # written to MLflow, but not to the study
    tracker.flush()
    client = MlflowClient(tracking_uri=uri)
    copy = trial_runs(uri)[0]
    double = client.create_run(copy.info.experiment_id, tags=copy.data.tags)
    client.set_terminated(double.info.run_id)
    tracker.finish("KILLED")

    resumed = make(uri)
    resumed.start(note="", identity=IDENTITY, records=[*records[:3], records[5]])
    runs = trial_runs(uri)
    assert numbers(runs) == [0, 1, 2, 5]
    assert all(run.info.status != "RUNNING" for run in runs)
    resumed.trial_started(3, records[3].evaluation.configuration)
    resumed.trial_finished(records[3])
    resumed.finish("FINISHED")
    assert numbers(trial_runs(uri)) == [0, 1, 2, 3, 5]
    assert resumed.link == tracker.link


def test_long_curves_long_reasons_and_text_of_any_script(uri: str) -> None:
    (first, *_) = synthetic_records(1)
    curves = tuple(
        CurvePoint(metric="training_loss", step=step, value=1 / (1 + step)) for step in range(2500)
    )
    evaluation = Evaluation(
        configuration=first.evaluation.configuration,
        status="failed",
        reason="Fehler ≠ 誤り " + "x" * 9000,
        values={"trainable_parameters": 10.0, "accuracy": math.nan},
        curves=curves,
    )
    track(uri, [TrialRecord(number=0, evaluation=evaluation)], [])
    (run,) = trial_runs(uri)
    history = MlflowClient(tracking_uri=uri).get_metric_history(run.info.run_id, "curve/training_loss")
    assert len(history) == 2500
    assert run.data.tags["autopeft.reason"].startswith("Fehler ≠ 誤り")
    assert run.data.tags["autopeft.reason"].endswith("characters)")
    assert "accuracy" not in run.data.metrics


def test_two_searches_in_one_store_at_once(uri: str) -> None:
    records = synthetic_records(10)
    trackers = [make(uri, name) for name in ("one", "two")]
    for tracker in trackers:
        tracker.start(note="", identity=IDENTITY, records=())
    for record in records:
        for tracker in trackers:
            tracker.trial_started(record.number, record.evaluation.configuration)
            tracker.trial_finished(record)
    for tracker in trackers:
        tracker.finish("FINISHED")
        assert tracker.failures == 0
    for name in ("one", "two"):
        assert numbers(trial_runs(uri, name)) == list(range(10))


@pytest.mark.parametrize("uri", ["./mlruns", "file:///somewhere/mlruns"])
def test_a_file_store_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"use a database such as 'sqlite:///mlflow\.db'"):
        make(uri)


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        make(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


def test_shortened_says_so() -> None:
    assert shortened("short", 100) == "short"
    cut = shortened("y" * 1000, 100)
    assert len(cut) <= 100
    assert "1000 characters" in cut
