"""An executor that trains trials on workers of a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from autopeft.core.errors import check_whole
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Duplicate, Job, New, Replicate, Resume
from autopeft.evaluation.trial_runner import TrialRunner

_logger = logging.getLogger(__name__)
_ATTEMPTS = 2
"""A job whose workers died so often is a failed trial: it may be what kills them."""
_CONNECTION_SECONDS = 10.0
_PATIENCE_SECONDS = 1800.0
"""For a worker to start: loading a backbone and its data, on a cluster that may be busy."""
_GRACE_SECONDS = 60.0
"""For the other workers to start, once the first has."""
_PAUSE_SECONDS = 1.0
_DOUBLINGS = 6
"""Each further start in a row that fails doubles the pause before the next, so many times."""


@dataclass(frozen=True, kw_only=True)
class RayExecutor:
    """Trains trials side by side in Ray actors, as in `Search(executor=RayExecutor(workers=8))`.

    Each worker holds a backbone and the data of its own. The search's folder has to be one that all workers
    reach under the same path: what trainings leave is written there. A worker that dies is replaced, as soon
    as the cluster has room, and its job run again by the first that is free. A trial has the same seed and
    data on whichever worker it runs; which trials are proposed depends on the order in which others finish.

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
                start, or the search has warm starts.
        """
        return _RayJobs(runner, self)


_Training = New | Resume | Replicate
"""A job that takes a worker."""


class _Worker:
    """What an actor holds: a runner with a backbone of its own."""

    def __init__(self, folder: str, shared: Sequence[Any], threads: int) -> None:
        import ray

        os.chdir(folder)  # paths of data, models and trials may be relative
        torch.set_num_threads(threads)
        self._runner: TrialRunner = ray.get(shared[0])

    def is_ready(self) -> bool:
        """Answer, once the worker has its backbone and data."""
        return True

    def run(self, job: Job) -> TrialRecord:
        return self._runner.run(job)


@dataclass(frozen=True)
class _Running:
    """A job that a worker has."""

    job: _Training
    worker: Any
    attempt: int


class _RayJobs:
    """Runs each job on a free worker; the first to finish is returned first."""

    serves_hidden_states = True

    def __init__(self, runner: TrialRunner, settings: RayExecutor) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("RayExecutor needs Ray: pip install 'autopeft[ray]'.") from error
        if runner.warm_starts is not None:
            raise ValueError("RayExecutor has no warm starts: each worker would train its own largest LoRA.")
        if runner.evaluator.device.type == "cuda" and not settings.gpus_per_worker:
            raise ValueError("Trials are trained on a GPU: say gpus_per_worker, below 1 to share one.")
        self._ray: Any = ray
        self._runner, self._settings = runner, settings
        self._starting: dict[Any, Any] = {}  # by their answer that they are ready
        self._asked: dict[Any, Any] = {}  # that were idle when another died, by their answer that they live
        self._failed_starts = 0  # in a row
        self._restarts: list[float] = []  # when to start workers in place of those that failed to
        self._idle: list[Any] = []
        self._running: dict[Any, _Running] = {}
        self._waiting: deque[tuple[_Training, int]] = deque()  # for a worker, each with its attempt
        self._duplicates: deque[Duplicate] = deque()
        # What becomes of a worker that is killed, or whose host is, and of a record that is lost with it. A
        # job that ran out of memory is a record.
        errors = ray.exceptions
        self._deaths = (
            errors.RayActorError,
            errors.ActorUnschedulableError,
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
        )
        self._starts_ray = not ray.is_initialized()
        try:
            if self._starts_ray:
                self._start_ray()
            self._workers = self._checked_workers()
            self._shared = ray.put(runner)
            # A worker is replaced here, and not by Ray, which would not say what became of its job.
            self._actor: Any = ray.remote(
                num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker, max_restarts=0
            )(_Worker)
            for _ in range(self._workers):
                self._start_worker()
            while self._starting or not self._idle:
                answer = self._first_answer(_GRACE_SECONDS if self._idle else _PATIENCE_SECONDS)
                if answer is None:
                    break  # the others join later
                self._take_in(answer)
        except BaseException:
            self.close()
            raise

    def _start_ray(self) -> None:
        settings = self._settings
        host, _, port = (settings.address or "").rpartition(":")
        cores = None
        if settings.address is None and settings.workers is not None:
            # A machine of fewer cores runs as many workers as it is asked to: slower, and no error.
            cores = settings.workers * settings.cpus_per_worker
        try:
            if port.isdigit() and "/" not in host:
                # Ray itself would try again for minutes.
                socket.create_connection((host, int(port)), timeout=_CONNECTION_SECONDS).close()
            self._ray.init(
                settings.address or "local",  # None would join a cluster that runs on this machine
                num_cpus=cores,
                include_dashboard=None if settings.address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"No Ray cluster was found at {settings.address!r}: {error}") from error

    def _checked_workers(self) -> int:
        """Return the number of workers; raise where there is no room for one. Others may start later."""
        settings, present = self._settings, self._ray.cluster_resources()
        needed = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
        there = {name: present.get(name, 0) for name in needed}
        room = min(int(there[name] / each) for name, each in needed.items() if each)
        if not room:
            takes, has = (
                " and ".join(f"{count:g} {name}" for name, count in counts.items())
                for counts in (needed, there)
            )
            raise ValueError(f"A worker takes {takes}, but the cluster has {has}.")
        if settings.workers is None:
            return room
        if room < settings.workers:
            _logger.warning(
                "The cluster has room for %d of %d workers: the others start when it has grown.",
                room,
                settings.workers,
            )
        return settings.workers

    def _start_worker(self) -> None:
        worker = self._actor.remote(os.getcwd(), [self._shared], self._settings.cpus_per_worker)
        self._starting[worker.is_ready.remote()] = worker

    def _first_answer(self, patience: float = _PATIENCE_SECONDS) -> Any:
        """Wait for a worker to be ready, or to finish a job; return None after some seconds without any job.

        Raises:
            ValueError: No worker is left, and none found a place in the cluster.
        """
        end = math.inf if self._running else time.monotonic() + patience
        while (now := time.monotonic()) < end:
            for due in [due for due in self._restarts if due <= now]:
                self._restarts.remove(due)
                self._start_worker()
            awaited = [*self._running, *self._starting, *self._asked]
            seconds = min([end, *self._restarts]) - now
            if not awaited:
                time.sleep(seconds)
                continue
            timeout = None if math.isinf(seconds) else seconds
            answers, _ = self._ray.wait(awaited, num_returns=1, timeout=timeout)
            if answers:
                return answers[0]
        if self._idle:
            return None
        raise ValueError(f"No worker found a place in the cluster within {patience / 60:g} minutes.")

    def _take_in(self, answer: Any) -> None:
        """Have a worker that is ready, or another in place of one that died: after a pause if it never was.

        Raises:
            ValueError: One after another dies, and no worker is left.
        """
        is_new = answer in self._starting
        worker = (self._starting if is_new else self._asked).pop(answer)
        try:
            self._ray.get(answer)
        except self._deaths as error:
            if not is_new:
                self._start_worker()
                return
            self._failed_starts += 1
            is_left = self._running or self._idle or self._asked
            if self._failed_starts > self._workers and not is_left:
                raise ValueError(f"A worker could not be started: {error}") from error
            pause = _PAUSE_SECONDS * 2 ** min(self._failed_starts - 1, _DOUBLINGS)
            name = type(error).__name__
            _logger.warning("A worker could not be started (%s); the next try is in %g s.", name, pause)
            self._restarts.append(time.monotonic() + pause)
        else:
            if is_new:
                self._failed_starts = 0
            self._idle.append(worker)

    @property
    def free(self) -> int:
        if self._duplicates:
            return 0
        # Where no worker is left, a job may wait for one that starts.
        return len(self._idle) or int(not self._running and not self._waiting)

    def submit(self, job: Job) -> None:
        if isinstance(job, Duplicate):
            self._duplicates.append(job)  # nothing is trained
        else:
            self._waiting.append((job, 1))
            self._hand_out()

    def _hand_out(self) -> None:
        """Give the jobs that wait to idle workers."""
        while self._waiting and self._idle:
            job, attempt = self._waiting.popleft()
            worker = self._idle.pop()
            self._running[worker.run.remote(job)] = _Running(job, worker, attempt)

    def wait(self) -> TrialRecord | None:
        if self._duplicates:
            return self._runner.run(self._duplicates.popleft())
        while True:
            answer = self._first_answer()
            if answer in self._running:
                record = self._finished(answer)
                self._hand_out()
                if record is not None:
                    return record
            else:
                self._take_in(answer)
                self._hand_out()
                if self._idle:
                    return None  # it may have a job at once

    def _finished(self, answer: Any) -> TrialRecord | None:
        """Return the record of a job; None where its worker died and it is to be run again."""
        running = self._running.pop(answer)
        try:
            record: TrialRecord = self._ray.get(answer)
        except self._deaths as error:
            self._ray.kill(running.worker)  # it may live, out of reach
            # What killed it may have killed those that wait, which is not the next job's fault.
            self._asked |= {worker.is_ready.remote(): worker for worker in self._idle}
            self._idle.clear()
            self._start_worker()
            if running.attempt == _ATTEMPTS:
                return self._runner.failed(running.job, f"{_ATTEMPTS} workers died of it: {error}")
            _logger.warning(
                "The worker of trial %d died (%s); it is run again on another one.",
                running.job.number,
                type(error).__name__,
            )
            self._waiting.append((running.job, running.attempt + 1))
            return None
        self._idle.append(running.worker)
        return record

    def close(self) -> None:
        busy = (running.worker for running in self._running.values())
        for worker in (*self._idle, *self._starting.values(), *self._asked.values(), *busy):
            self._ray.kill(worker)
        for kept in (self._idle, self._starting, self._asked, self._restarts, self._running, self._waiting):
            kept.clear()
        if self._starts_ray:
            self._ray.shutdown()
