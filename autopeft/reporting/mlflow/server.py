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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlflow import MlflowClient

from autopeft.reporting.mlflow.run_content import SEARCH_TAG, VIEW_TAG
from autopeft.reporting.mlflow.saved_view import view_link
from autopeft.reporting.mlflow.store import check_server, checked_store, unusable_store
from autopeft.reporting.mlflow.tracking_uri import redact, redact_in

HOST = "127.0.0.1"
_START_SECONDS = 90


class MlflowServer(NamedTuple):
    """The address and the process of a running MLflow server."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def mlflow_server(uri: str, port: int = 5000) -> Iterator[MlflowServer]:
    """Run an MLflow server over a tracking store until the `with` block ends, on a port, or a free one."""
    port = _free_port(port)
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", HOST, "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,  # all users see the arguments of a process
        # Jobs are for evaluating language models; their eight workers would take a minute to start.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        server = MlflowServer(f"http://{HOST}:{port}", process)
        try:
            if not _is_up(server):
                output.seek(0)
                said = redact_in(output.read().decode(errors="replace").strip(), uri)
                raise RuntimeError(f"The MLflow server did not start. It said:\n{said}")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _is_up(server: MlflowServer) -> bool:
    """Return whether a server answers before it ends or the time is over."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=2):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def serve(uri: str, *, port: int = 5000) -> None:
    """Serve the UI until Ctrl-C or SIGTERM, and print a link to the front of every search in the store.

    A store that is a server's address has its UI there: its links are printed, and nothing is served.
    """
    uri, _ = checked_store(uri)
    if uri.startswith("http"):
        check_server(uri)
        _print_links(redact(uri), find_fronts(uri), " (the server of this store)")
        return
    fronts = find_fronts(uri)
    # SIGTERM does what Ctrl-C does: left alone, it would end this process and leave the server.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with mlflow_server(uri, port) as server:
            if not server.url.endswith(f":{port}"):
                print(f"Port {port} is in use: serving on {server.url.rpartition(':')[2]}.")
            _print_links(server.url, fronts)
            print("Ctrl-C stops it.", flush=True)
            try:
                server.process.wait()
            except KeyboardInterrupt:
                print()
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_links(url: str, fronts: list[tuple[str, str, str | None]], remark: str = "") -> None:
    print(f"MLflow UI: {url}{remark}")
    for name, experiment_id, key in fronts:
        print(f"  {name}: {view_link(url, experiment_id, key)}")


def find_fronts(uri: str) -> list[tuple[str, str, str | None]]:
    """Return every search of a store, the latest first: its name, experiment and saved view."""
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
