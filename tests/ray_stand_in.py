"""A stand-in for Ray, in which time passes where it is waited."""

from __future__ import annotations

import math
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from tempfile import mkdtemp
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from autopeft import RayExecutor
from autopeft.core.configuration import Configuration
from autopeft.core.jobs import New
from autopeft.evaluation import ray_executor
from autopeft.evaluation.context import Compute

START_SECONDS = 3.0


class RayError(Exception):
    """Ray's word for all of its errors."""


class WorkerDiedError(RayError):
    """Ray's word for a worker that is gone."""


class OutOfReachError(WorkerDiedError):
    """Ray's word for a worker that may live."""


class PreemptedError(WorkerDiedError):
    """Ray's word for a worker whose host was taken away."""

    preempted = True


class RecordLostError(RayError):
    """Ray's word for what a worker returned, and was lost with its host."""


class TaskError(RayError):
    """Ray's word for an exception that left a worker, which lives on."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"Where it was raised.\n{cause}")
        self.cause = cause


NODE = "node"
ADDRESS = "127.0.0.1:6379"
HERE = Compute(device="cpu", precision="32-true", dtype="float32", fingerprint="0")


@dataclass(eq=False)
class Call:
    """What a worker returns, and when; None where it has died, and an error where that is known."""

    due: float
    value: Any


@dataclass(eq=False)
class Cluster:
    """What a RayExecutor calls of Ray.

    Attributes:
        can_start: Of one start after another, whether the worker comes up; None for one without a place.
        trials: How long each trial takes, and whether its worker survives it, or the error of its call.
        lives: Of one idle worker after another that is asked whether it lives, whether it does.
        nodes_have: The resources of each node, and whether it is alive.
        computes: With what the workers train.
        shares: Of one worker after another, whether it has the driver's folder.
        now: The time in seconds.
        starts: When workers were started.
    """

    can_start: Iterator[bool | None]
    trials: Iterator[tuple[float, bool | Exception]]
    lives: Iterator[bool] = field(default_factory=lambda: repeat(True))
    nodes_have: list[tuple[dict[str, float], bool]] = field(default_factory=lambda: [({"CPU": 8.0}, True)])
    computes: Iterator[Compute] = field(default_factory=lambda: repeat(HERE))
    shares: Iterator[bool] = field(default_factory=lambda: repeat(True))
    now: float = 0.0
    starts: list[float] = field(default_factory=list)
    exceptions = SimpleNamespace(
        RayError=RayError,
        RayTaskError=TaskError,
        RayActorError=WorkerDiedError,
        ActorUnavailableError=OutOfReachError,
        ActorUnschedulableError=WorkerDiedError,
        WorkerCrashedError=WorkerDiedError,
        NodeDiedError=RecordLostError,
        OutOfMemoryError=WorkerDiedError,
        ObjectLostError=RecordLostError,
    )

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=ADDRESS)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": NODE, "Alive": lives, "Resources": has} for has, lives in self.nodes_have]

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self.start)

    def start(self, _: str, shared: list[Any], threads: int) -> Any:
        self.starts.append(self.now)
        is_up = next(self.can_start)
        token = (shared[0].checkpoints.folder / "ray_token").read_text() if next(self.shares) else ""
        found = NODE, next(self.computes), token
        due = math.inf if is_up is None else self.now + START_SECONDS
        calls = iter([Call(due, found if is_up else None)])

        def ready() -> Call:
            return next(calls, None) or Call(self.now, found if next(self.lives) else None)

        return SimpleNamespace(ready=SimpleNamespace(remote=ready), run=SimpleNamespace(remote=self.run))

    def run(self, job: New) -> Call:
        seconds, outcome = next(self.trials)
        record = job.number if outcome is True else None
        return Call(self.now + seconds, outcome if isinstance(outcome, Exception) else record)

    def wait(self, calls: list[Call], *, num_returns: int, timeout: float | None) -> Any:
        assert num_returns == 1
        first = min(calls, key=lambda call: call.due)
        if timeout is not None and self.now + timeout < first.due:
            self.sleep(timeout)
            return [], calls
        self.now = max(self.now, first.due)
        return [first], [call for call in calls if call is not first]

    def get(self, call: Call) -> Any:
        if call.value is None:
            raise WorkerDiedError("Of an actor that was here.\nIt was killed.")
        if isinstance(call.value, Exception):
            raise call.value
        return call.value

    def kill(self, worker: Any) -> None:
        raise OutOfReachError

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def executor_on(
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    untrained: Mapping[int, int] = MappingProxyType({}),
    **settings: Any,
) -> Any:
    """Return an executor, by default of two workers; of a trial that fails the reason is the record.

    Trials may have to begin with a training of the largest LoRA.
    """
    monkeypatch.setitem(sys.modules, "ray", cluster)
    clock = SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep)
    monkeypatch.setattr(ray_executor, "time", clock)
    folder = Path(mkdtemp())
    weakref.finalize(cluster, shutil.rmtree, folder)
    runner: Any = SimpleNamespace(
        checkpoints=SimpleNamespace(folder=folder),
        evaluator=SimpleNamespace(device=torch.device("cpu"), compute=HERE),
        failed=lambda job, reason: reason,
        untrained=lambda job: untrained.get(job.number),
    )
    return RayExecutor(**{"workers": 2, **settings})(runner)


def records_of(executor: Any) -> Iterator[Any]:
    """Yield the records of the jobs that an executor has; workers that come in between get no other."""
    return (record for record in iter(executor.wait, "never") if record is not None)


def trial(number: int) -> New:
    return New(number=number, configuration=Configuration())
