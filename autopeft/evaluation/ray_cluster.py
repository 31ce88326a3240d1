"""A Ray that is started or joined: how many workers it has room for, and what their ends say."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import Any, Literal

_CONNECTION_SECONDS = 10.0


class RayCluster:
    """Ray, on this machine or several.

    Args:
        address: Of a running cluster; None to start Ray on this machine.
        cores: That a Ray which is started is to have; None for the machine's.

    Attributes:
        ray: The package.

    Raises:
        ValueError: Ray is not installed, the cluster cannot be reached, or this process is in another one.
    """

    def __init__(self, address: str | None, cores: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("RayExecutor needs Ray: pip install 'autopeft[ray]'.") from error
        self.ray: Any = ray
        errors = ray.exceptions
        # An actor's death by the loss of its host is a RayActorError all the same.
        self._losses = errors.ActorUnavailableError, errors.NodeDiedError, errors.ObjectLostError
        self._deaths = (
            errors.RayActorError,
            errors.ActorUnschedulableError,
            errors.WorkerCrashedError,
            errors.OutOfMemoryError,  # of the host; a job that ran out of memory itself is a record
        )
        self._is_own = not ray.is_initialized()
        if not self._is_own:
            self._check_address(address)
            return
        try:
            self._start(address, cores)
        except BaseException:
            ray.shutdown()
            raise

    def _check_address(self, address: str | None) -> None:
        """Raise where this process is in another cluster than it is asked to join."""
        if address in (None, "auto"):
            return
        present = self.ray.get_runtime_context().gcs_address
        host, _, port = str(address).rpartition(":")
        with suppress(OSError, UnicodeError):  # what is no name of a host is not the cluster's
            host = socket.gethostbyname(host)
        here, _, its_port = present.rpartition(":")
        is_here = host == here or host.startswith("127.")  # a host knows itself by several names
        if not is_here or port != its_port:
            raise ValueError(
                f"Ray was started in this process beforehand, at {present} and not at {address!r}: leave the "
                "address out, or call ray.shutdown() first."
            )

    def _start(self, address: str | None, cores: int | None) -> None:
        host, _, port = (address or "").rpartition(":")
        try:
            if port.isdigit() and "/" not in host:
                # Ray itself would try again for minutes.
                socket.create_connection((host, int(port)), timeout=_CONNECTION_SECONDS).close()
            self.ray.init(
                address or "local",  # None would join a cluster that runs on this machine
                num_cpus=cores,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"No Ray cluster was found at {address!r}: {error}") from error

    def room(self, cpus: int, gpus: float) -> int:
        """Return how many workers of so many cores and GPUs find a place, each on one node.

        Raises:
            ValueError: None does.
        """
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        nodes = [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]
        room = sum(int(min(cores // cpus, _shares(present, gpus))) for cores, present in nodes)
        if not room:
            has = "; ".join(f"{cores} CPU and {present} GPU" for cores, present in sorted(set(nodes)))
            raise ValueError(
                f"A worker takes {cpus} CPU and {gpus:g} GPU, which no node has: they have {has}."
            )
        return room

    def end_of(self, error: Exception, node: str) -> Literal["death", "loss", "error"]:
        """Say how a call to a worker ended that raised an error.

        By the worker's death: it was killed, or its code raised a RuntimeError, as where CUDA fails. By its
        loss: with its host, or what it returned is lost, or it is out of reach. By an error of the call,
        which another worker would raise, too.

        Args:
            error: What was raised.
            node: Ray's id of the host that the worker was on.
        """
        if isinstance(error, self._losses) or getattr(error, "preempted", False):
            return "loss"
        if isinstance(error, self.ray.exceptions.RayTaskError) and isinstance(error.cause, RuntimeError):
            return "death"
        if not isinstance(error, self._deaths):
            return "error"
        alive = {each["NodeID"] for each in self.ray.nodes() if each["Alive"]}
        return "death" if node in alive else "loss"

    def kill(self, actor: Any) -> None:
        """End a worker; one that is gone, or out of reach, is left."""
        with suppress(self.ray.exceptions.RayError):
            self.ray.kill(actor)

    def close(self) -> None:
        """Stop Ray, if it was started here."""
        if self._is_own:
            self.ray.shutdown()


def _shares(gpus: int, each: float) -> float:
    """Return for how many workers there are GPUs: a share is of one GPU and not of two."""
    if not each:
        return float("inf")
    return gpus // each if each >= 1 else gpus * int(1 / each)


def reason_of(error: Exception) -> str:
    """Return the cause of an error of Ray's in a line; in its text it stands below where it came from."""
    if (cause := getattr(error, "cause", None)) is not None:
        first, *_ = (str(cause).strip() or "no message").splitlines()
        return f"{type(cause).__name__}: {first}"
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
