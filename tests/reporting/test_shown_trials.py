"""When a trial's run is shown in MLflow as running."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from mlflow import MlflowClient

from autopeft.core.evaluation import TrialRecord
from autopeft.reporting.mlflow.run_backends import FinishedRun
from autopeft.reporting.mlflow.run_content import finished_run
from autopeft.reporting.mlflow.tracker import SHOW
from tests.records import IDENTITY, synthetic_records
from tests.reporting.test_tracker import make, numbers, trial_runs


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_trials_are_shown_as_running_once_they_have_run_for_a_second(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that are trained together."""
    records = synthetic_records(2)
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._SHOW_AFTER_SECONDS", 0.2)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    before = int(1000 * time.time())
    tracker.trials_started({one.number: one.evaluation.configuration for one in records})
    after = int(1000 * time.time())
    deadline = time.monotonic() + 20
    while len(runs := trial_runs(uri)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [run.info.status for run in runs] == ["RUNNING", "RUNNING"]
    assert all(before <= run.info.start_time <= after for run in runs)
    for record in records:
        tracker.trial_finished(record)
    tracker.finish("FINISHED")
    assert {run.info.run_id for run in trial_runs(uri)} == {run.info.run_id for run in runs}


def test_a_quick_trial_is_written_in_one_piece(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = synthetic_records(1)
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._SHOW_AFTER_SECONDS", 20.0)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    with patch.object(tracker._trial_runs, "start") as start:
        tracker.trials_started({0: record.evaluation.configuration})
        time.sleep(0.3)  # the thread has seen it
        tracker.trial_finished(record)
        tracker.finish("FINISHED")
    assert not start.called
    assert [run.info.status for run in trial_runs(uri)] == ["FINISHED"]


def test_a_trial_that_could_not_be_shown_is_shown_at_the_next_attempt(uri: str) -> None:
    (record,) = synthetic_records(1)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    start = tracker._trial_runs.start
    with patch.object(tracker._trial_runs, "start", side_effect=[OSError("busy"), "run"]) as failing:
        tracker.trials_started({0: record.evaluation.configuration})
        tracker.flush(20)
    assert failing.call_count == 2
    assert (tracker._runs, tracker.failures) == ({0: "run"}, 0)
    tracker._runs[0] = start("trial", {}, started=0)
    tracker.trial_finished(record)
    tracker.finish("FINISHED")


def test_an_interrupted_trial_is_not_shown_after_the_end(uri: str) -> None:
    (record,) = synthetic_records(1)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())

    def comes_due(_: Path) -> None:
        assert tracker._writer.ending.wait(20)
        tracker._writer.call_now(SHOW)

    tracker.trials_started({0: record.evaluation.configuration})
    tracker.log_report(comes_due, "late")
    tracker.finish("KILLED")
    assert trial_runs(uri) == []
    assert tracker.failures == 0


def test_quick_trials_share_a_transaction(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = synthetic_records(6)
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._GATHER_SECONDS", 20.0)
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._MOST_GATHERED", 4)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    times = [int(1000 * time.time())]
    with patch.object(tracker._trial_runs, "finish", wraps=tracker._trial_runs.finish) as finish:
        for record in records:
            tracker.trial_finished(record)
            times.append(int(1000 * time.time()))
            time.sleep(0.01)
        tracker.finish("FINISHED")
    assert [len(call.args[0]) for call in finish.call_args_list] == [4, 2]
    runs = {int(run.data.tags["autopeft.trial"]): run.info for run in trial_runs(uri)}
    for record, (before, after) in zip(records, pairwise(times), strict=True):  # not when they were written
        info = runs[record.number]
        assert before <= info.end_time <= after
        assert info.start_time == info.end_time - int(1000 * record.evaluation.cost.wall_seconds)
    assert tracker.failures == 0


def test_a_trial_is_there_a_second_after_it_is_over(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._GATHER_SECONDS", 0.2)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    for record in synthetic_records(2):
        tracker.trial_finished(record)
    deadline = time.monotonic() + 20
    while len(trial_runs(uri)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert numbers(trial_runs(uri)) == [0, 1]
    tracker.finish("FINISHED")


def test_a_trial_that_goes_on_within_a_second_has_one_run(uri: str) -> None:
    record = next(one for one in synthetic_records(20) if len(one.evaluation.curves) > 1)
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
    expected = [(one.step, one.value) for one in curves if one.metric == curves[0].metric]
    assert sorted((one.step, one.value) for one in history) == expected


def test_a_trial_that_cannot_be_written_takes_no_other_with_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(parent: str, record: TrialRecord, **options: Any) -> FinishedRun:
        run = finished_run(parent, record, **options)
        return replace(run, params={"": None}) if record.number == 1 else run  # type: ignore[dict-item]

    monkeypatch.setattr("autopeft.reporting.mlflow.write_queue.time.sleep", lambda seconds: None)
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker.finished_run", broken)
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
    write = tracker._trial_runs.finish

    def slowly(runs: Any) -> list[str]:
        ids = write(runs)
        tracker.front_changed([second.number])
        return ids

    tracker.front_changed([first.number])
    with patch.object(tracker._trial_runs, "finish", slowly):
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
