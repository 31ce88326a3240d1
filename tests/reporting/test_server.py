"""`serve` as a process of its own, as the command line runs it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopeft.reporting.mlflow.server import HOST, mlflow_server, serve
from autopeft.reporting.mlflow.tracker import MlflowTracker
from tests.records import IDENTITY, OBJECTIVES, pareto_front, synthetic_records

SERVE = (
    "import sys; from autopeft.reporting.mlflow.server import serve; "
    "serve(sys.argv[1], port=int(sys.argv[2]))"
)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        yield int(taken.getsockname()[1])


def read_until(process: subprocess.Popen[str], last: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if last in line:
            return said
    raise AssertionError(f"{last!r} was not said, but:\n{said}")


@pytest.mark.parametrize("end", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_link_is_printed_and_the_server_ends_with_the_command(
    end: signal.Signals, busy_port: int, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(
        uri, experiment="autopeft", search_name="shown", study_id="a", objectives=OBJECTIVES
    )
    tracker.start(note="", identity=IDENTITY, records=synthetic_records(2))
    tracker.publish_front(pareto_front(synthetic_records(2)))
    tracker.finish("FINISHED")
    command = [sys.executable, "-c", SERVE, uri, str(busy_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = read_until(process, "Ctrl-C stops it.")
        assert f"Port {busy_port} is in use" in said
        address = next(line.split()[-1] for line in said.splitlines() if line.startswith("MLflow UI"))
        assert f"shown: {tracker.link.replace('http://127.0.0.1:5000', address)}" in said
        # Artifacts are found from any folder, and pages are shown rather than taken for text.
        (page,) = tmp_path.glob("mlartifacts/*/artifacts/pareto/front.html")
        query = f"run_id={page.parts[-4]}&path=pareto/front.html"
        with urllib.request.urlopen(f"{address}/get-artifact?{query}", timeout=30) as answer:
            assert answer.headers["content-type"].startswith("text/html")
            assert len(answer.read()) == page.stat().st_size
        process.send_signal(end)
        assert process.wait(timeout=30) == 0
    with socket.socket() as probe:
        assert probe.connect_ex((HOST, int(address.rsplit(":")[-1]))) != 0


@pytest.mark.slow
def test_a_server_is_its_own_ui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowTracker(
        uri, experiment="autopeft", search_name="shown", study_id="a", objectives=OBJECTIVES
    )
    tracker.start(note="", identity=IDENTITY, records=())
    tracker.finish("FINISHED")
    with mlflow_server(uri) as server:
        capsys.readouterr()
        serve(server.url)  # returns, where serving would go on
        said = capsys.readouterr().out
    assert f"MLflow UI: {server.url} (the server of this store)" in said
    assert f"shown: {tracker.link.replace('http://127.0.0.1:5000', server.url)}" in said
    with pytest.raises(ValueError, match="No MLflow server answers at"):
        serve(server.url)


def test_a_store_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MLflow 3 can write"):
        serve("./mlruns")
    (tmp_path / "text.db").write_text("hello " * 10)
    with pytest.raises(ValueError, match="no SQLite database"):
        serve(f"sqlite:///{tmp_path / 'text.db'}")
