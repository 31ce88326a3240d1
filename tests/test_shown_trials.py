"""When a trial's run is shown in MLflow as running."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.records import IDENTITY, synthetic_records
from tests.test_tracking import make, trial_runs


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_trial_is_shown_as_running_once_it_has_run_for_a_second(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = synthetic_records(1)
    monkeypatch.setattr("autopeft.tracking._SHOW_AFTER_SECONDS", 0.2)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.trial_started(0, record.evaluation.configuration)
    deadline = time.monotonic() + 20
    while not (runs := trial_runs(uri)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [run.info.status for run in runs] == ["RUNNING"]
    tracker.trial_finished(record)
    tracker.finish("FINISHED")
    assert [run.info.run_id for run in trial_runs(uri)] == [runs[0].info.run_id]


def test_a_quick_trial_is_written_in_one_piece(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = synthetic_records(1)
    monkeypatch.setattr("autopeft.tracking._SHOW_AFTER_SECONDS", 20.0)
    tracker = make(uri)
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.trial_started(0, record.evaluation.configuration)
    time.sleep(0.3)  # the thread has seen it
    with patch.object(tracker._trial_runs, "start") as start:
        tracker.trial_finished(record)
        tracker.finish("FINISHED")
    assert not start.called
    assert [run.info.status for run in trial_runs(uri)] == ["FINISHED"]
