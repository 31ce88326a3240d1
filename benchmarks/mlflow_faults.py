"""Faults of MLflow's store and of the clock, for `benchmarks/faults.py`; how any fault says that it came."""

from __future__ import annotations

import atexit
import mmap
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any
from unittest.mock import patch

from mlflow import MlflowClient

from autopeft import Search
from autopeft.reporting.mlflow.server import mlflow_server
from benchmarks.fault_studies import processes_below

_DAY = 86_400.0
_UNTIL_THE_END = ExitStack()
atexit.register(_UNTIL_THE_END.close)
_NOBODY = 65_534
LONGEST_FREEZE = 70.0
"""Seconds after which a server answers again: a search waits for a minute at its end."""
STRUCK = mmap.mmap(-1, 1)
"""Shared with the children: whether a fault came before the call had ended."""

Fault = Callable[[random.Random, Search], object]
"""What a child does to its search before it runs; see `Study` for where that keeps its files."""


def strike(*_: Any) -> None:
    """Say that a fault came."""
    STRUCK[0] = 1


def place_of(search: Search) -> Path:
    """Return the folder of a study."""
    return search.folder.parents[1]


def clock_set_back(draw: random.Random, search: Search) -> None:
    """Set the clock back by up to a day, from a random moment on, while runs are written to MLflow."""
    _mlflow_of_its_own(search)
    now, back = time.time, draw.random() * _DAY

    def set_back() -> None:
        strike()
        patch("time.time", lambda: now() - back).start()

    Timer(max(0.0, draw.uniform(-2, 4)), set_back).start()


def mlflow_gone(draw: random.Random, search: Search) -> None:
    """Let there be no server where the search expects it."""
    strike()
    search.tracking = "http://127.0.0.1:1"


def _mlflow_of_its_own(search: Search) -> Path:
    """Give a search MLflow's database, and the process a user whom modes bind; return the folder."""
    place = place_of(search)
    store = place / "mlflow"
    search.tracking = f"sqlite:///{store}/mlflow.db"
    os.environ["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"  # an open file could still be written
    if os.geteuid() == 0:  # whom no mode keeps from writing
        for path in (place, *place.rglob("*")):
            os.chown(path, _NOBODY, _NOBODY)
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    for path in (store, *store.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return store


def mlflow_read_only(draw: random.Random, search: Search) -> None:
    """Let MLflow's database and artifacts be read alone, from the start or from a random moment on."""
    store = _mlflow_of_its_own(search)

    def forbid() -> None:
        strike()
        for path in (store, *store.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)

    Timer(max(0.0, draw.uniform(-2, 4)), forbid).start()


def mlflow_away(draw: random.Random, search: Search) -> None:
    """Let nobody reach MLflow's database and artifacts from a random moment on, for a random time."""
    store = _mlflow_of_its_own(search)

    def close() -> None:
        strike()
        store.chmod(0)
        Timer(draw.uniform(0, 4), store.chmod, [0o755]).start()

    Timer(max(0.0, draw.uniform(-2, 4)), close).start()


def mlflow_frozen(draw: random.Random, search: Search) -> None:
    """Let a server keep connections and not answer, from a random moment on, for up to `LONGEST_FREEZE`."""
    url, processes = a_server()
    search.tracking = url
    _send(signal.SIGCONT, processes)

    def freeze() -> None:
        strike()
        _send(signal.SIGSTOP, processes)
        Timer(draw.uniform(1, LONGEST_FREEZE), _send, [signal.SIGCONT, processes]).start()

    Timer(max(0.0, draw.uniform(-2, 4)), freeze).start()


@cache
def a_server() -> tuple[str, list[int]]:
    """Return the address and the processes of a server that ends with this process."""
    folder = _UNTIL_THE_END.enter_context(tempfile.TemporaryDirectory())
    server = _UNTIL_THE_END.enter_context(mlflow_server(f"sqlite:///{folder}/mlflow.db"))
    processes = list(processes_below(server.process.pid))
    _UNTIL_THE_END.callback(_send, signal.SIGCONT, processes)  # one that is stopped would not end
    return server.url, processes


def _send(how: signal.Signals, processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, how)


@cache
def empty_store() -> bytes:
    """Return MLflow's database without an experiment: making it takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments(max_results=1)
        return path.read_bytes()
