"""Tracking stores: which are taken, and why others are refused."""

from __future__ import annotations

import logging
import signal
import threading
import time
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import optuna
import pytest

from autopeft.reporting.mlflow.store import checked_store
from tests.learnable import tiny_search
from tests.records import IDENTITY, pareto_front, synthetic_records
from tests.reporting.test_tracker import make, numbers, trial_runs


@pytest.mark.parametrize(
    "uri", ["./mlruns", "file:///somewhere/mlruns", "sqlite://", "sqlite:///", "sqlite:///:memory:"]
)
def test_a_store_of_files_or_in_memory_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"use a database such as 'sqlite:///mlflow\.db'"):
        make(uri)


def test_a_relative_store_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checked_store("sqlite:///a/mlflow.db") == (
        f"sqlite:///{tmp_path}/a/mlflow.db",
        (tmp_path / "a" / "mlartifacts").as_uri(),
    )
    assert checked_store("http://127.0.0.1:5000") == ("http://127.0.0.1:5000", None)


def test_a_file_that_is_no_store_of_mlflow_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("hello " * 10)
    with pytest.raises(ValueError, match="no SQLite database"):
        make(f"sqlite:///{tmp_path / 'text.db'}")
    (tmp_path / "broken.db").write_bytes(b"SQLite format 3\0" + b"x" * 4096)
    with pytest.raises(ValueError, match="no SQLite database"):
        make(f"sqlite:///{tmp_path / 'broken.db'}")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(ValueError, match="cannot be written"):
        make(f"sqlite:///{tmp_path / 'folder.db'}")
    with pytest.raises(ValueError, match="which a URI cannot carry"):
        make(f"sqlite:///{tmp_path / '100%' / 'mlflow.db'}")
    optuna.create_study(storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    with pytest.raises(ValueError, match="holds Optuna studies"):
        make(f"sqlite:///{tmp_path / 'optuna.db'}")


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written"):
        make(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


def test_a_store_that_cannot_be_written_ends_no_search_that_has_trials(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    store = Path(uri.removeprefix("sqlite:///"))
    store.write_text("no database " * 10)
    search = tiny_search(tmp_path, tracking=uri)
    with pytest.raises(ValueError, match="no SQLite database"):
        search.run(trials=1, progress=False)
    with pytest.raises(ValueError, match="no finished trial yet"):
        search.front()
    store.unlink()
    search.run(trials=1, progress=False)
    store.rename(tmp_path / "away.db")
    store.write_text("no database " * 10)
    assert len(search.run(trials=2, progress=False).records) == 2
    assert "goes on and is not recorded in MLflow" in caplog.text
    assert "no SQLite database" in caplog.text
    (tmp_path / "away.db").replace(store)
    search.run(trials=2, progress=False)
    assert numbers(trial_runs(uri, search.name)) == [0, 1]


def test_a_study_of_more_runs_than_are_read_keeps_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._MOST_RUNS", 2)
    uri, records = f"sqlite:///{tmp_path / 'mlflow.db'}", synthetic_records(3)
    for known in ([], records):
        tracker = make(uri)
        tracker.start(note="", identity=IDENTITY, records=known)
        for record in records:
            tracker.trial_finished(record)
        tracker.finish("FINISHED", records)
    assert {0, 1, 2} == {*numbers(trial_runs(uri))}, "of one parent"


def test_a_server_that_does_not_answer_costs_a_warning_and_no_time(caplog: pytest.LogCaptureFixture) -> None:
    tracker = make("http://someone:opensesame@127.0.0.1:1")
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="autopeft"):
        tracker.start(note="", identity=IDENTITY, records=synthetic_records(2))
        tracker.trial_finished(synthetic_records(1)[0])
        tracker.publish_front(pareto_front(synthetic_records(1)))
        tracker.finish("FINISHED")
    assert time.monotonic() - begun < 20
    assert "The search is not recorded in MLflow" in caplog.text
    assert tracker.link == "http://127.0.0.1:1"
    assert "opensesame" not in caplog.text
    assert "someone" not in caplog.text


def test_a_search_that_is_interrupted_while_it_opens_mlflow_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, records = make(f"sqlite:///{tmp_path / 'mlflow.db'}"), synthetic_records(2)
    monkeypatch.setattr(tracker, "_open", lambda *_: time.sleep(3))
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tracker.start(note="", identity=IDENTITY, records=records)
    tracker.finish("KILLED", records)
    assert time.monotonic() - begun < 2.5
    tracker._worker.join(20)


def test_a_server_that_falls_silent_costs_a_warning_and_its_patience(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped right after it was asked for its health."""
    monkeypatch.setattr("autopeft.reporting.mlflow.tracker._PATIENCE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # else it stays set
    released = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if is_silent := self.path != "/health":
                released.wait(60)
            self.send_response(404 if is_silent else 200)  # which the client does not try again
            self.end_headers()

    records = synthetic_records(2)
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server, ExitStack() as at_the_end:
        threading.Thread(target=server.serve_forever).start()
        at_the_end.callback(server.shutdown)
        at_the_end.callback(released.set)
        tracker = make(f"http://127.0.0.1:{server.server_port}")
        begun = time.monotonic()
        with caplog.at_level(logging.WARNING, logger="autopeft"):
            tracker.start(note="", identity=IDENTITY, records=records)
            tracker.trial_finished(records[0])
            tracker.finish("FINISHED", records)
        assert time.monotonic() - begun < 20
        released.set()
        tracker._worker.join(20)
    assert "cannot be used (TimeoutError: no answer in 1 s)" in caplog.text
