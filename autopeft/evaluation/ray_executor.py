"""An executor that trains trials on workers of a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from autopeft.core.errors import check_whole
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Duplicate, Job, New, Replicate, Resume
from autopeft.evaluation.context import Compute
from autopeft.evaluation.ray_cluster import RayCluster, reason_of
from autopeft.evaluation.trial_runner import TrialRunner

_logger = logging.getLogger(__name__)
_DEATHS = 2
"""A job of which so many workers died is a failed trial: it may be what kills them."""
_LOSSES = 10
"""So many workers that a job lost with their hosts end it, or the call: such a cluster trains nothing."""
_PATIENCE_SECONDS = 1800.0
"""For a worker to start: loading a backbone and its data, on a cluster that may be busy."""
_GRACE_SECONDS = 60.0
"""For the other workers to start, once the first has; and until it is said that the first has not."""
_PAUSE_SECONDS = 1.0
_DOUBLINGS = 6
"""Each further start in a row that fails doubles the pause before the next, so many times."""


@dataclass(frozen=True, kw_only=True)
class RayExecutor:
    """Trains trials side by side in Ray actors, as in `Search(executor=RayExecutor(workers=8))`.

    Each worker holds a backbone and the data of its own. The search's folder has to be one that all workers
    reach under the same path: what trainings leave is written there, and a worker that finds another folder
    is refused. A worker that dies is replaced, as soon as the cluster has room, and its job run again by the
    first that is free. A trial has the same seed and data on whichever worker it runs; which trials are
    proposed depends on the order in which others finish.

    Attributes:
        workers: Trials that are trained at the same time. A cluster that has room for fewer begins with
            those, and others join as it grows. None for as many as there is room for at the beginning.
        gpus_per_worker: GPUs of a worker, a whole number; or a share below 1 of one that several use.
        cpus_per_worker: CPU cores of a worker, which is also the number of its threads.
        address: Of a running cluster, as in "auto" or "10.0.0.1:6379"; None to start Ray on this machine,
            and to stop it afterwards. One as "ray://10.0.0.1:10001" needs `pip install 'ray[client]'`.

    Raises:
        ValueError: A number is out of range.
    """

    workers: int | None = None
    gpus_per_worker: float = 0
    cpus_per_worker: int = 1
    address: str | None = None
    alters_trials: ClassVar[bool] = False  # a search goes on with another number of workers, or without
    trains_here: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_whole("workers", self.workers, least=1)
        check_whole("cpus_per_worker", self.cpus_per_worker, what="a number of cores", least=1)
        gpus = self.gpus_per_worker
        if not (0 <= gpus < 1 or (gpus >= 1 and float(gpus).is_integer())):
            raise ValueError(f"gpus_per_worker is a whole number of GPUs or a share below 1, got {gpus!r}.")

    def __call__(self, runner: TrialRunner) -> _RayJobs:
        """Start the workers.

        Raises:
            ValueError: Ray is not installed, the cluster cannot be reached or is too small, a worker cannot
                start, or Ray was started in this process at another address.
        """
        return _RayJobs(runner, self)


_Training = New | Resume | Replicate
"""A job that takes a worker."""


class _Worker:
    """What an actor holds: a runner with a backbone of its own."""

    def __init__(self, folder: str, shared: Sequence[Any], threads: int) -> None:
        import ray

        # Ray's handler raises in the training, which would be the trial's failure: a worker that is told to
        # end has to be gone. Ctrl-C does not reach it: Ray blocks SIGINT in what it starts.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)  # paths of data, models and trials may be relative
        torch.set_num_threads(threads)
        self._node = ray.get_runtime_context().get_node_id()
        self._runner: TrialRunner = ray.get(shared[0])

    def ready(self) -> tuple[str, Compute, str]:
        """Return the host's id, with what is trained there, and the token that the search's folder has there.

        It is called when the worker has its backbone and data, and when another has died.
        """
        token = ""
        with suppress(OSError):  # another folder, or none
            token = _token_file(self._runner).read_text()
        return self._node, self._runner.evaluator.compute, token

    def run(self, job: Job) -> TrialRecord:
        record = self._runner.run(job)
        for device in self._runner.evaluator.backbone.devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the context is gone, and every training fails
        return record


def _token_file(runner: TrialRunner) -> Path:
    """Return what the driver writes, for workers to find it where they write what trainings leave."""
    return runner.checkpoints.folder / "ray_token"


@dataclass(frozen=True)
class _Started:
    """A worker that has been ready, and its host's id."""

    actor: Any
    node: str


@dataclass(eq=False)
class _Task:
    """A job, and what became of workers that had it."""

    job: _Training
    deaths: int = 0  # of their processes
    losses: int = 0  # with their hosts, or out of reach
    largest: int | None = None  # the training of the largest LoRA that it begins with


class _RayJobs:
    """Runs each job on a free worker; the first to finish is returned first."""

    serves_hidden_states = True

    def __init__(self, runner: TrialRunner, settings: RayExecutor) -> None:
        if runner.evaluator.device.type == "cuda" and not settings.gpus_per_worker:
            raise ValueError("Trials are trained on a GPU: say gpus_per_worker, below 1 to share one.")
        self._runner, self._settings = runner, settings
        # A worker is starting until its first `ready` returns, then idle, and running while it has a task.
        # One that was idle when another died is probed until `ready` returns again. In the place of one that
        # is gone another is starting, or restarts have the time at which it will be: the five together are
        # always as many as there are to be. A task is waiting until a worker has it, which is running then,
        # and again where that worker dies or is lost.
        # Calls to workers are Ray's references to what they will return.
        self._starting: dict[Any, Any] = {}  # actors, by the call that ends when they are ready
        self._idle: list[_Started] = []
        self._probed: dict[Any, Any] = {}  # actors that were idle when another died, by a call to them
        self._running: dict[Any, tuple[_Task, _Started]] = {}
        self._waiting: deque[_Task] = deque()  # for a worker
        self._duplicates: deque[Duplicate] = deque()
        self._failed_starts = 0  # in a row
        self._restarts: list[float] = []  # when to start workers in place of those that failed to
        cores = None
        if settings.address is None and settings.workers is not None:
            # A machine of fewer cores runs as many workers as it is asked to: slower, and no error.
            cores = settings.workers * settings.cpus_per_worker
        self._cluster = RayCluster(settings.address, cores)
        self._ray = self._cluster.ray
        self._token = secrets.token_hex()
        try:
            token_file = _token_file(runner)
            token_file.parent.mkdir(parents=True, exist_ok=True)
            token_file.write_text(self._token)
            self._workers = self._number_of_workers()
            self._shared = self._ray.put(runner)
            # A worker is replaced here, and not by Ray, which would not say what became of its job.
            self._actor: Any = self._ray.remote(
                num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker, max_restarts=0
            )(_Worker)
            for _ in range(self._workers):
                self._start_worker()
            self._await_workers()
        except BaseException:
            self.close()
            raise

    def _number_of_workers(self) -> int:
        """Return the number of workers; raise where there is no room for one. Others may start later."""
        settings = self._settings
        room = self._cluster.room(settings.cpus_per_worker, settings.gpus_per_worker)
        if settings.workers is None:
            return room
        if room < settings.workers:
            _logger.warning(
                f"The cluster has room for {room} of {settings.workers} workers: the others start when it "
                "has grown."
            )
        return settings.workers

    def _start_worker(self) -> None:
        actor = self._actor.remote(os.getcwd(), [self._shared], self._settings.cpus_per_worker)
        self._starting[actor.ready.remote()] = actor

    def _await_workers(self) -> None:
        """Wait for the first worker, and a while for the others, which may also join later."""
        if not self._admit_until(lambda: bool(self._idle), _GRACE_SECONDS):
            _logger.warning(
                "No worker has started within a minute: it waits for a place in the cluster, or still loads "
                "backbone and data. The search begins with the first."
            )
            if not self._admit_until(lambda: bool(self._idle), _PATIENCE_SECONDS):
                raise _no_place()
        self._admit_until(lambda: not self._starting, _GRACE_SECONDS)

    def _admit_until(self, are_there: Callable[[], bool], seconds: float) -> bool:
        """Take workers that are ready until enough are there; return False where the time is over before."""
        end = time.monotonic() + seconds
        while not are_there():
            if (call := self._first_ended(end)) is None:
                return False
            self._admit(call)
        return True

    def _first_ended(self, end: float) -> Any:
        """Wait for a worker to be ready, or to finish a job, and return the call; None if none is until then.

        Meanwhile workers are started in place of those that could not be, when they are due.
        """
        while (now := time.monotonic()) < end:
            for due in [due for due in self._restarts if due <= now]:
                self._restarts.remove(due)
                self._start_worker()
            calls = [*self._running, *self._starting, *self._probed]
            seconds = min([end, *self._restarts]) - now
            if not calls:
                time.sleep(seconds)
                continue
            timeout = None if math.isinf(seconds) else seconds
            ended, _ = self._ray.wait(calls, num_returns=1, timeout=timeout)
            if ended:
                return ended[0]
        return None

    def _admit(self, call: Any) -> None:
        """Have a worker that is ready, or start another in place of one that is not.

        Raises:
            ValueError: One after another dies or would train otherwise, and no worker is left.
        """
        is_new = call in self._starting
        actor = (self._starting if is_new else self._probed).pop(call)
        try:
            node, compute, token = self._ray.get(call)
        except Exception as error:
            if self._cluster.end_of(error, "") == "error":
                raise
            reason, differs = reason_of(error), False
        else:
            reason = self._difference(compute, token)
            differs = bool(reason)
            if not differs:
                if is_new:
                    self._failed_starts = 0
                self._idle.append(_Started(actor, node))
                return
        self._cluster.kill(actor)
        if not is_new:
            self._start_worker()
            return
        self._failed_starts += 1
        is_left = self._running or self._idle or self._probed
        # Another try may be luckier, but for workers that differ, of which all were seen.
        if self._failed_starts + differs > self._workers and not is_left:
            raise ValueError(f"A worker could not be started: {reason}")
        pause = _PAUSE_SECONDS * 2 ** min(self._failed_starts - 1, _DOUBLINGS)
        _logger.warning("A worker could not be started; the next try is in %g s: %s", pause, reason)
        self._restarts.append(time.monotonic() + pause)

    def _difference(self, compute: Compute, token: str) -> str:
        """Say how a worker would train otherwise than this process counts, or where; "" if it would not."""
        if token != self._token:
            folder = _token_file(self._runner).parent.absolute()
            shared = "The search's folder has to be on a disk that all hosts share."
            return f"it finds another folder at {folder} than this process. {shared}"
        own = self._runner.evaluator.compute
        return "" if compute == own else own.difference(compute)

    @property
    def at_once(self) -> int:
        return max(1, len(self._idle) + len(self._running) + len(self._probed))

    @property
    def free(self) -> int:
        if self._duplicates:
            return 0
        # Where no worker is left, a job may wait for one that starts.
        places = len(self._idle) - len(self._waiting)
        return places if places > 0 else int(not self._running and not self._waiting)

    def submit(self, job: Job) -> None:
        if isinstance(job, Duplicate):
            self._duplicates.append(job)  # nothing is trained
        else:
            self._waiting.append(_Task(job))
            self._assign()

    def _assign(self) -> None:
        """Give the jobs that wait to idle workers, but those that inherit what another is training."""
        waiting, self._waiting = self._waiting, deque()
        for task in waiting:
            task.largest = self._runner.untrained(task.job) if self._idle else None
            in_training = {other.largest for other, _ in self._running.values()} - {None}
            if not self._idle or task.largest in in_training:
                self._waiting.append(task)
                continue
            worker = self._idle.pop()
            self._running[worker.actor.run.remote(task.job)] = task, worker

    def wait(self) -> TrialRecord | None:
        if self._duplicates:
            return self._runner.run(self._duplicates.popleft())
        while True:
            end = math.inf if self._running else time.monotonic() + _PATIENCE_SECONDS
            if (call := self._first_ended(end)) is None:
                raise _no_place()
            record = None
            if call in self._running:
                record = self._finished(call)
            else:
                self._admit(call)
            self._assign()
            if record is not None or self._idle:  # which may have a job at once
                return record

    def _finished(self, call: Any) -> TrialRecord | None:
        """Return the record of a job; None where its worker is gone and it is to be run again."""
        task, worker = self._running.pop(call)
        try:
            record: TrialRecord = self._ray.get(call)
        except Exception as error:
            end = self._cluster.end_of(error, worker.node)
            if end == "error":
                raise
            self._cluster.kill(worker.actor)  # it may live, out of reach, or without the use of its GPU
            # What killed it may have killed those that wait, which is not the next job's fault.
            self._probed |= {each.actor.ready.remote(): each.actor for each in self._idle}
            self._idle.clear()
            self._start_worker()
            return self._given_back(task, error, is_loss=end == "loss")
        self._idle.append(worker)
        return record

    def _given_back(self, task: _Task, error: Exception, *, is_loss: bool) -> TrialRecord | None:
        """Have a job run again; return its record where too many workers are gone that had it."""
        reason = reason_of(error)
        task.losses += is_loss
        task.deaths += not is_loss
        if task.deaths == _DEATHS:
            return self._runner.failed(task.job, f"{_DEATHS} workers died of it: {reason}")
        if task.losses == _LOSSES:
            if isinstance(task.job, New):
                return self._runner.failed(task.job, f"{_LOSSES} workers that had it were lost: {reason}")
            # A failure would count against what is known of the trial.
            raise RuntimeError(
                f"{_LOSSES} workers that had trial {task.job.number} were lost with their hosts, or are out "
                f"of reach: {reason} What is done is kept; the same call goes on."
            )
        message = "The worker of trial %d is gone; another one runs it again: %s"
        raised = error if hasattr(error, "cause") else None  # its traceback says where
        _logger.warning(message, task.job.number, reason, exc_info=raised)
        self._waiting.append(task)
        return None

    def close(self) -> None:
        started = (*self._idle, *(worker for _, worker in self._running.values()))
        actors = [*self._starting.values(), *self._probed.values(), *(worker.actor for worker in started)]
        try:
            for actor in actors:
                self._cluster.kill(actor)
        finally:
            for kept in (self._idle, self._starting, self._probed, self._restarts, self._running):
                kept.clear()
            self._waiting.clear()
            self._cluster.close()


def _no_place() -> ValueError:
    return ValueError(f"No worker found a place in the cluster within {_PATIENCE_SECONDS / 60:g} minutes.")
