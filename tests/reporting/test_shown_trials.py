"""Which runs of trials MLflow shows while a search runs."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from mlflow import MlflowClient

from autopeft.core.evaluation import TrialRecord
from autopeft.reporting.mlflow.run_writer import RunWriter
from tests.records import IDENTITY, synthetic_records
from tests.reporting.test_tracker import make, numbers, trial_runs


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_trials_are_shown_as_running(uri: str) -> None:
    """Two that are trained together."""
    records = synthetic_records(2)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    before = int(1000 * time.time())
    for record in records:
        tracker.trial_started(record.number, record.evaluation.configuration)
    after = int(1000 * time.time())
    tracker.flush()
    runs = trial_runs(uri)
    assert [run.info.status for run in runs] == ["RUNNING", "RUNNING"]
    assert all(before <= run.info.start_time <= after for run in runs)
    for record in records:
        tracker.trial_finished(record)
    tracker.finish("FINISHED")
    assert {run.info.run_id for run in trial_runs(uri)} == {run.info.run_id for run in runs}


def test_an_interrupted_trial_is_shown_as_killed_and_goes_on_at_the_next_call(uri: str) -> None:
    (record,) = synthetic_records(1)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.trial_started(0, record.evaluation.configuration)
    tracker.finish("KILLED")
    assert tracker.failures == 0
    (before,) = trial_runs(uri)
    assert before.info.status == "KILLED"
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.trial_finished(record)
    tracker.finish("FINISHED")
    (after,) = trial_runs(uri)
    assert (after.info.run_id, after.info.status) == (before.info.run_id, "FINISHED")


def test_a_trial_ends_when_it_ended_and_not_when_it_is_written(uri: str) -> None:
    records = synthetic_records(6)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    tracker._worker.put(partial(time.sleep, 0.5))
    moments = []
    for record in records:
        before = int(1000 * time.time())
        tracker.trial_finished(record)
        moments.append((before, int(1000 * time.time())))
        time.sleep(0.01)
    tracker.finish("FINISHED")
    runs = {int(run.data.tags["autopeft.trial"]): run.info for run in trial_runs(uri)}
    for record, (before, after) in zip(records, moments, strict=True):
        info = runs[record.number]
        assert before <= info.end_time <= after
        assert info.start_time == info.end_time - int(1000 * record.evaluation.cost.wall_seconds)
    assert tracker.failures == 0


def test_a_trial_that_goes_on_at_once_has_one_run(uri: str) -> None:
    record = next(record for record in synthetic_records(20) if len(record.evaluation.curves) > 1)
    curves = record.evaluation.curves
    at_rung = replace(record.evaluation, status="paused", reason="at a rung", curves=curves[:1])
    paused = replace(record, evaluation=at_rung)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.trial_finished(paused)
    tracker.trial_finished(record)
    tracker.finish("FINISHED")
    (run,) = trial_runs(uri)
    assert run.info.status == "FINISHED"
    name = f"curve/{curves[0].metric}"
    history = MlflowClient(uri).get_metric_history(run.info.run_id, name)
    expected = [(point.step, point.value) for point in curves if point.metric == curves[0].metric]
    assert sorted((metric.step, metric.value) for metric in history) == expected


def test_a_trial_that_cannot_be_written_takes_no_other_with_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = RunWriter.finish

    def broken(writer: RunWriter, record: TrialRecord, *arguments: Any) -> None:
        if record.number == 1:
            raise ValueError("broken")
        finish(writer, record, *arguments)

    monkeypatch.setattr(RunWriter, "finish", broken)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    for record in synthetic_records(3):
        tracker.trial_finished(record)
    tracker.finish("FINISHED")
    assert numbers(trial_runs(uri)) == [0, 2]
    assert tracker.failures == 1


def test_the_front_may_change_while_a_trial_is_written(uri: str) -> None:
    """Its tag is brought up to date afterwards: what was written is remembered, not what is true by then."""
    first, second = synthetic_records(2)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    write = tracker._runs.finish

    def slowly(record: TrialRecord, *arguments: Any) -> None:
        write(record, *arguments)
        tracker.front_changed([second.number])

    tracker.front_changed([first.number])
    with patch.object(tracker._runs, "finish", slowly):
        for record in (first, second):
            tracker.trial_finished(record)
        tracker.finish("FINISHED")
    tags = {run.data.tags["autopeft.trial"]: run.data.tags["autopeft.pareto"] for run in trial_runs(uri)}
    assert tags == {"0": "false", "1": "true"}


def test_a_search_that_goes_on_leaves_the_front_tagged(uri: str) -> None:
    records = synthetic_records(3)
    for _ in range(2):
        tracker = make(uri)
        tracker.start(note="", identity=IDENTITY, records=records, members=[0, 2])
        tracker.finish("FINISHED", records)
        tags = {run.data.tags["autopeft.trial"]: run.data.tags["autopeft.pareto"] for run in trial_runs(uri)}
        assert tags == {"0": "true", "1": "false", "2": "true"}
