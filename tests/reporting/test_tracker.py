"""Tracking against real MLflow stores."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autopeft.core.evaluation import CurvePoint, Evaluation, TrialRecord
from autopeft.reporting.mlflow.run_content import front_markdown, shortened
from autopeft.reporting.mlflow.tracker import MlflowTracker
from tests.records import IDENTITY, OBJECTIVES, front_of, pareto_front, synthetic_records


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(empty_store: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(empty_store, tmp_path / 'mlflow.db')}"


def make(uri: str, name: str = "one", study_id: str | None = None) -> MlflowTracker:
    study = study_id or f"study of {name.replace(chr(39), chr(32))}"
    return MlflowTracker(uri, experiment="autopeft", search_name=name, study_id=study, objectives=OBJECTIVES)


def parent_run(uri: str, name: str = "one") -> Run:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`autopeft.search` LIKE '%'")
    (parent,) = (run for run in runs if run.data.tags["autopeft.search"] == name)
    return parent


def trial_runs(uri: str, name: str = "one") -> list[Run]:
    parent = parent_run(uri, name)
    runs = MlflowClient(tracking_uri=uri).search_runs(
        [parent.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        max_results=1000,
    )
    return sorted(runs, key=lambda run: int(run.data.tags["autopeft.trial"]))


def numbers(runs: list[Run]) -> list[int]:
    return [int(run.data.tags["autopeft.trial"]) for run in runs]


def track(uri: str, records: list[TrialRecord], members: list[int]) -> MlflowTracker:
    tracker = make(uri)
    tracker.start(note="a search", identity=IDENTITY, records=())
    for record in records:
        tracker.trial_started(record.number, record.evaluation.configuration)
        tracker.trial_finished(record)
        tracker.progress({"hypervolume": 0.1 * record.number}, step=record.number)
    tracker.front_changed(members)
    tracker.publish_front(pareto_front(records, search="one"))
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
        names = {file.path for file in MlflowClient(tracking_uri=uri).list_artifacts(run.info.run_id)}
        assert names == {"configuration.yaml", "configuration.svg"}


def test_a_front_is_written_every_minute_and_less_often_where_that_takes_long(uri: str) -> None:
    assert make(uri).is_front_due, "the first trial is to be seen at once"
    tracker = track(uri, synthetic_records(2), [0])
    assert not tracker.is_front_due
    tracker._front_put -= 61
    assert 0 < tracker._front_seconds < 61
    tracker._front_seconds = 1.0
    assert tracker.is_front_due
    tracker._front_seconds = 3.0
    assert not tracker.is_front_due
    tracker._front_put -= 90
    assert tracker.is_front_due


def test_the_search_is_a_run_with_the_front(uri: str, tmp_path: Path) -> None:
    records = synthetic_records(12)
    track(uri, records, [0, 3])
    client = MlflowClient(tracking_uri=uri)
    parent = parent_run(uri)
    assert parent.info.status == "FINISHED"
    names = {file.path for file in client.list_artifacts(parent.info.run_id, "pareto")}
    assert {"pareto/front.html", "pareto/front.png", "pareto/front.csv"} <= names
    assert f"Pareto front: {len(front_of(records))} of 12" in parent.data.tags["mlflow.note.content"]
    (page,) = tmp_path.glob("mlartifacts/*/artifacts/pareto/front.html")
    assert "autopeft export 0 --search one --to adapters/0" in page.read_text()
    assert parent.data.params["backbone.name"] == IDENTITY["backbone"]["name"]
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert [metric.step for metric in history] == list(range(12))
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
    tracker.flush()
    tracker._worker.stop(20)

    resumed = make(uri)
    resumed.start(note="", identity=IDENTITY, records=[*records[:3], records[5]])
    resumed.flush()
    runs = trial_runs(uri)
    assert numbers(runs) == [0, 1, 2, 3, 5]
    assert [numbers([run]) for run in runs if run.info.status == "RUNNING"] == [[3]]
    resumed.trial_started(3, records[3].evaluation.configuration)
    resumed.trial_finished(records[3])
    resumed.finish("FINISHED")
    assert numbers(trial_runs(uri)) == [0, 1, 2, 3, 5]
    assert [run.info.status for run in trial_runs(uri)] == ["FINISHED"] * 5
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


def write_trials(uri: str, name: str, count: int) -> None:
    tracker = make(uri, name)
    tracker.start(note="", identity=IDENTITY, records=())
    for record in synthetic_records(count):
        tracker.trial_started(record.number, record.evaluation.configuration)
        tracker.trial_finished(record)
        tracker.front_changed([record.number])
    tracker.finish("FINISHED")
    assert tracker.failures == 0


@pytest.mark.slow
def test_searches_in_one_store_at_once(uri: str) -> None:
    names = ("one", "two", 'it\'s "three" ü')
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_trials, args=(uri, name, 10)) for name in names[1:]]
    for process in processes:
        process.start()
    write_trials(uri, names[0], 10)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for name in names:
        assert numbers(trial_runs(uri, name)) == list(range(10))
        tagged = [run for run in trial_runs(uri, name) if run.data.tags["autopeft.pareto"] == "true"]
        assert numbers(tagged) == [9]


def test_another_study_of_the_same_name_and_settings_keeps_its_runs(uri: str) -> None:
    records = synthetic_records(4)
    first, other = make(uri, study_id="first"), make(uri, study_id="other")
    first.start(note="", identity=IDENTITY, records=records)
    other.start(note="", identity=IDENTITY, records=records[:1])  # at once
    first.finish("FINISHED", records)
    other.finish("FINISHED", records[:1])
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == (1 + 4) + (1 + 1)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert first.link != other.link


def test_finished_runs_that_a_study_does_not_know_stay_with_a_warning(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a study's folder that was restored from a backup."""
    old, new = synthetic_records(3), synthetic_records(3, seed=1)
    track(uri, old, [])
    tracker = make(uri)
    with caplog.at_level(logging.WARNING, logger="autopeft"):
        tracker.start(note="", identity=IDENTITY, records=new[1:])
    tracker.finish("FINISHED")
    assert "MLflow has 3 finished runs of 'one' that its study does not know" in caplog.text
    keys = [run.data.params["configuration_key"] for run in trial_runs(uri)]
    assert sorted(keys) == sorted(record.evaluation.configuration.key for record in [*old, *new[1:]])


def test_names_and_text_that_mlflow_refuses(uri: str) -> None:
    record = synthetic_records(1)[0]
    evaluation = Evaluation(
        configuration=record.evaluation.configuration,
        status="failed",
        reason="half a character \udce9",
        values={"F1@5 (%)": 0.5},
        curves=(CurvePoint(metric="loss@1", step=1, value=math.inf),),
    )
    identity = {"task": {"[fields]": "", **{str(n): "x" for n in range(150)}}}
    tracker = make(uri)
    tracker.start(note="n" * 9000, identity=identity, records=[replace(record, evaluation=evaluation)])
    tracker.progress({"hypervolume": math.nan, "front_size": 1.0}, step=0)
    tracker.finish("FINISHED")
    assert tracker.failures == 0
    (run,) = trial_runs(uri)
    assert run.data.metrics["F1_5 ___"] == 0.5
    assert run.data.tags["autopeft.reason"] == r"half a character \udce9"
    assert not any(name.startswith("curve/") for name in run.data.metrics)
    parent = parent_run(uri)
    assert parent.data.params["task._fields_"] == "none"
    assert len(parent.data.params) == 151
    assert parent.data.metrics == {"front_size": 1.0}
    assert "9000 characters" in parent.data.tags["mlflow.note.content"]


def test_the_table_of_trials_is_written_once(uri: str) -> None:
    for _ in range(2):
        track(uri, synthetic_records(5), [1])
    folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    (table,) = folder.glob(f"{parent_run(uri).info.run_id}/artifacts/pareto/trials_*.json")
    assert len(json.loads(table.read_text())["data"]) == 5


def test_what_cannot_be_written_is_counted_and_does_not_end_the_search(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = synthetic_records(2)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    shutil.rmtree(artifacts)
    artifacts.write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="autopeft"):
        for record in records:
            tracker.trial_finished(record)
        tracker.flush()
        assert tracker.failures == 2
        tracker.finish("KILLED", records)
    assert caplog.text.count("could not be written to MLflow (") == 1
    assert "2 trials could not be written" in caplog.text
    assert all(run.info.status == "KILLED" for run in trial_runs(uri))
    artifacts.unlink()
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=records)
    tracker.finish("FINISHED")
    assert numbers(trial_runs(uri)) == [0, 1]
    assert all(run.info.status == "FINISHED" for run in trial_runs(uri))


def test_what_failed_is_written_at_the_end_where_mlflow_is_back(uri: str) -> None:
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    shutil.rmtree(artifacts)
    artifacts.write_text("in the way")
    records = synthetic_records(2)
    for record in records:
        tracker.trial_finished(record)
    tracker.flush()
    assert tracker.failures == 2
    artifacts.unlink()
    tracker.finish("FINISHED", records)
    assert tracker.failures == 2
    assert [run.info.status for run in trial_runs(uri)] == ["FINISHED"] * 2


@pytest.mark.slow
def test_a_trial_costs_the_search_next_to_nothing(uri: str) -> None:
    records = synthetic_records(50)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    start = time.perf_counter()
    for record in records:
        tracker.trial_started(record.number, record.evaluation.configuration)
        tracker.trial_finished(record)
        tracker.front_changed([record.number])
        tracker.progress({"hypervolume": 0.5}, step=record.number)
    assert time.perf_counter() - start < 0.02 * len(records)
    tracker.finish("FINISHED")


def test_ending_twice_or_before_the_start_does_nothing(uri: str) -> None:
    tracker = make(uri)
    tracker.finish("FAILED")
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.finish("FINISHED")
    tracker.finish("FAILED")
    tracker.flush()
    assert parent_run(uri).info.status == "FINISHED"


def test_a_long_front_fits_the_note() -> None:
    records = [record for record in synthetic_records(300) if record.evaluation.status == "complete"]
    text = front_markdown(records, {record.number for record in records}, OBJECTIVES)
    assert len(text) < 5000
    assert f"and {len(records) - 30} more" in text
    best = max(records, key=lambda record: record.evaluation.values["accuracy"])
    assert text.splitlines()[4].startswith(f"| {best.number} |")
    assert front_markdown([], front_of([]), OBJECTIVES).startswith("**Pareto front: 0 of 0 trials**")


def start_search(uri: str) -> None:
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=synthetic_records(2))
    tracker.finish("FINISHED")


@pytest.mark.slow
def test_killed_while_the_store_is_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = multiprocessing.get_context("spawn").Process(target=start_search, args=(uri,))
    process.start()
    while not list(tmp_path.glob("mlflow-new-*/mlflow.db")) and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "mlflow.db").exists()
    start_search(uri)
    assert numbers(trial_runs(uri)) == [0, 1]


def test_shortened_says_so() -> None:
    assert shortened("short", 100) == "short"
    cut = shortened("y" * 1000, 100)
    assert len(cut) <= 100
    assert "1000 characters" in cut
