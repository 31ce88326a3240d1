"""Serve the MLflow UI on the loopback interface, and say where the fronts are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from mlflow import MlflowClient

from autopeft.reporting.mlflow.saved_view import view_link
from autopeft.reporting.mlflow.store import check_server, checked_store, unusable_store
from autopeft.reporting.mlflow.tracker import SEARCH_TAG, VIEW_TAG
from autopeft.reporting.mlflow.tracking_uri import redact, redact_in

HOST = "127.0.0.1"
_START_SECONDS = 90


class MlflowServer:
    """An MLflow server over a tracking store; use it in a `with` block.

    Args:
        uri: Backend store, as in "sqlite:///mlflow.db".
        port: Wanted port; another free one is taken where it is in use.

    Attributes:
        url: Address of the UI.
    """

    def __init__(self, uri: str, port: int = 5000) -> None:
        self.uri = uri
        self.port = _free_port(port)
        self.url = f"http://{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST]
        command += ["--port", str(self.port), "--workers", "1"]
        environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": self.uri,  # all users see the arguments of a process
            # Jobs are for evaluating language models; their eight workers would take a minute to start.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self._output = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        self._output.seek(0)
        said = redact_in(self._output.read().decode(errors="replace").strip(), self.uri)
        raise RuntimeError(f"The MLflow server did not start. It said:\n{said}")

    def wait(self) -> None:
        """Wait until the server ends."""
        self._process.wait()

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def __exit__(self, *error: object) -> None:
        self._stop()


def serve(uri: str, *, port: int = 5000) -> None:
    """Serve the UI until Ctrl-C or SIGTERM, and print a link to the front of every search in the store.

    A store that is a server's address has its UI there: its links are printed, and nothing is served.

    Raises:
        ValueError: The store cannot be opened.
        RuntimeError: The server does not start.
    """
    uri, _ = checked_store(uri)
    if uri.startswith("http"):
        check_server(uri)
    fronts = find_fronts(uri)
    if uri.startswith("http"):
        print(f"MLflow UI: {redact(uri)} (the server of this store)")
        _print_links(redact(uri), fronts)
        return
    with _interrupted_by_sigterm(), MlflowServer(uri, port) as server:
        if server.port != port:
            print(f"Port {port} is in use: serving on {server.port}.")
        print(f"MLflow UI: {server.url}")
        _print_links(server.url, fronts)
        print("Ctrl-C stops it.", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print()


def _print_links(url: str, fronts: Iterable[tuple[str, str, str | None]]) -> None:
    for name, experiment_id, key in fronts:
        print(f"  {name}: {view_link(url, experiment_id, key)}")


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: left alone, it would end this process and leave the server."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def find_fronts(uri: str) -> list[tuple[str, str, str | None]]:
    """Return every search of a store, the latest first: its name, experiment and saved view.

    Raises:
        ValueError: MLflow cannot open the store.
    """
    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.`{SEARCH_TAG}` LIKE '%'", max_results=100)
    except Exception as error:  # of MLflow, its database driver or the network
        raise unusable_store(uri, error) from None  # whose text may have a password
    return [(run.data.tags[SEARCH_TAG], run.info.experiment_id, run.data.tags.get(VIEW_TAG)) for run in runs]


def _free_port(wanted: int) -> int:
    """Return a port, or another one where it is in use."""
    with socket.socket() as probe:
        if probe.connect_ex((HOST, wanted)) != 0:
            return wanted
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
