"""Serve the MLflow UI on the loopback interface, and say where the fronts are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from autopeft.reporting.mlflow.saved_view import view_link
from autopeft.reporting.mlflow.store import checked_store
from autopeft.reporting.mlflow.tracker import SEARCH_TAG, VIEW_TAG

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
        self.port = port if _is_free(port) else _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._output = tempfile.TemporaryFile()
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.uri]
        command += ["--host", HOST, "--port", str(self.port), "--workers", "1"]
        # Jobs are for evaluating language models; their eight workers would take a minute to start.
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_up(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()
        raise RuntimeError(f"The MLflow server did not start. It said:\n{said}")

    def wait(self) -> None:
        """Wait until the server ends."""
        assert self._process is not None
        self._process.wait()

    def stop(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._output.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def serve(uri: str, *, port: int = 5000) -> None:
    """Serve the UI until Ctrl-C or SIGTERM, and print a link to the front of every search in the store.

    A store that is a server's address has its UI there: its links are printed, and nothing is served.

    Raises:
        ValueError: The store cannot be opened.
        RuntimeError: The server does not start.
    """
    uri, _ = checked_store(uri)
    if uri.startswith("http"):
        _check_answers(uri)
    fronts = find_fronts(uri)
    if uri.startswith("http"):
        print(f"MLflow UI: {uri} (the server of this store)")
        _print_links(uri, fronts)
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


def _check_answers(url: str) -> None:
    """Raise ValueError where no server is: MLflow's client would try again for minutes, and say nothing."""
    user = urlsplit(url).netloc.rpartition("@")
    address = f"{url.rstrip('/')}/health".replace("".join(user[:2]), "", 1)
    try:
        with urllib.request.urlopen(address, timeout=10):
            pass
    except urllib.error.HTTPError:
        pass  # one that refuses this page may yet answer the client, which sends its password
    except OSError as error:
        raise ValueError(f"No MLflow server answers at {url}: {error}.") from error


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
        experiments = [one.experiment_id for one in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.`{SEARCH_TAG}` LIKE '%'", max_results=100)
    except MlflowException as error:
        raise ValueError(f"MLflow cannot open the tracking store {uri!r}: {error}") from error
    return [(run.data.tags[SEARCH_TAG], run.info.experiment_id, run.data.tags.get(VIEW_TAG)) for run in runs]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) != 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
