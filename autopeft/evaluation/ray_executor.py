"""An executor that trains trials on workers of a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
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


@dataclass(frozen=True, kw_only=True)
class RayExecutor:
    """Trains trials side by side in Ray actors, as in `Search(executor=RayExecutor(workers=8))`.

    Each worker holds a backbone and the data of its own. The search's folder has to be one that all workers
    reach under the same path: what trainings leave is written there. A worker that dies is replaced, and its
    job run again. A trial has the same seed and data on whichever worker it runs; which trials are proposed
    depends on the order in which others finish.

    Attributes:
        workers: Trials that are trained at the same time.
        gpus_per_worker: GPUs of a worker; below 1 several share one.
        cpus_per_worker: CPU cores of a worker, which is also the number of its threads.
        address: Of a running cluster, as in "auto" or "ray://head:10001"; None to start Ray on this machine,
            and to stop it afterwards.

    Raises:
        ValueError: A number is out of range.
    """

    workers: int
    gpus_per_worker: float = 0
    cpus_per_worker: int = 1
    address: str | None = None
    alters_trials: ClassVar[bool] = False  # a search goes on with another number of workers, or without

    def __post_init__(self) -> None:
        check_whole("workers", self.workers, least=1)
        check_whole("cpus_per_worker", self.cpus_per_worker, what="a number of cores", least=1)
        if not self.gpus_per_worker >= 0:
            raise ValueError(f"gpus_per_worker is 0 or more, got {self.gpus_per_worker!r}.")

    def __call__(self, runner: TrialRunner) -> _RayJobs:
        """Start the workers.

        Raises:
            ValueError: Ray is not installed, the cluster cannot be reached or is too small, a worker cannot
                start, or the search has warm starts.
        """
        return _RayJobs(runner, self)


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

    job: New | Resume | Replicate
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
        self._idle: list[Any] = []
        self._running: dict[Any, _Running] = {}
        self._duplicates: deque[Duplicate] = deque()
        # What becomes of a worker that is killed, or whose host is. A job that ran out of memory is a record.
        errors = ray.exceptions
        self._deaths = (errors.RayActorError, errors.NodeDiedError, errors.OutOfMemoryError)
        self._starts_ray = not ray.is_initialized()
        try:
            if self._starts_ray:
                self._start_ray()
            self._check_resources()
            self._shared = ray.put(runner)
            # A worker is replaced here, and not by Ray, which would not say what became of its job.
            self._actor: Any = ray.remote(
                num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker, max_restarts=0
            )(_Worker)
            self._idle = [self._new_worker() for _ in range(settings.workers)]
            self._wait_for(self._idle)
        except BaseException:
            self.close()
            raise

    def _start_ray(self) -> None:
        settings = self._settings
        host, _, port = (settings.address or "").rpartition(":")
        # A machine of fewer cores runs as many workers as it is asked to: slower, and no error.
        cores = settings.workers * settings.cpus_per_worker if settings.address is None else None
        try:
            if port.isdigit() and "/" not in host:
                # Ray itself would try again for minutes.
                socket.create_connection((host, int(port)), timeout=_CONNECTION_SECONDS).close()
            self._ray.init(
                settings.address,
                num_cpus=cores,
                include_dashboard=None if settings.address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"No Ray cluster was found at {settings.address!r}: {error}") from error

    def _check_resources(self) -> None:
        settings, present = self._settings, self._ray.cluster_resources()
        for name, each in (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker)):
            if settings.workers * each > present.get(name, 0):
                raise ValueError(
                    f"{settings.workers} workers take {settings.workers * each:g} {name}s, but the cluster "
                    f"has {present.get(name, 0):g}."
                )

    def _new_worker(self) -> Any:
        return self._actor.remote(os.getcwd(), [self._shared], self._settings.cpus_per_worker)

    def _wait_for(self, workers: Sequence[Any]) -> None:
        """Wait until workers have their backbones and data.

        Raises:
            ValueError: One could not start, or found no place in the cluster.
        """
        try:
            self._ray.get([worker.is_ready.remote() for worker in workers], timeout=_PATIENCE_SECONDS)
        except (*self._deaths, self._ray.exceptions.GetTimeoutError) as error:
            raise ValueError(f"A worker could not be started: {error}") from error

    @property
    def free(self) -> int:
        return 0 if self._duplicates else len(self._idle)

    def submit(self, job: Job) -> None:
        if isinstance(job, Duplicate):
            self._duplicates.append(job)  # nothing is trained
        else:
            self._start(job, attempt=1)

    def _start(self, job: New | Resume | Replicate, attempt: int) -> None:
        worker = self._idle.pop()
        self._running[worker.run.remote(job)] = _Running(job, worker, attempt)

    def wait(self) -> TrialRecord:
        if self._duplicates:
            return self._runner.run(self._duplicates.popleft())
        while True:
            (finished, *_), _ = self._ray.wait(list(self._running), num_returns=1)
            running = self._running.pop(finished)
            try:
                record: TrialRecord = self._ray.get(finished)
            except self._deaths as error:
                self._ray.kill(running.worker)  # it may live, out of reach
                self._idle.append(self._new_worker())
                self._wait_for(self._idle[-1:])
                if running.attempt == _ATTEMPTS:
                    return self._runner.failed(running.job, f"{_ATTEMPTS} workers died of it: {error}")
                _logger.warning(
                    "The worker of trial %d died (%s); it is run again on another one.",
                    running.job.number,
                    type(error).__name__,
                )
                self._start(running.job, running.attempt + 1)
            else:
                self._idle.append(running.worker)
                return record

    def close(self) -> None:
        for worker in (*self._idle, *(running.worker for running in self._running.values())):
            self._ray.kill(worker)
        self._idle.clear()
        self._running.clear()
        if self._starts_ray:
            self._ray.shutdown()
