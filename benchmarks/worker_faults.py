"""What becomes of a search when one of its Ray workers is killed, or the network to it is cut.

    python -m benchmarks.worker_faults [--kills 50] [--signals 4] [--cuts 4] [--seed 0]

A tiny random model is searched by two workers of one Ray, each time with another seed. In each of the first
searches, one of the worker processes gets a signal at a random moment: `--kills` times SIGKILL, then
`--signals` times SIGTERM; it counts where the process is gone of it. Ray keeps Ctrl-C from workers: it blocks
SIGINT in what it starts. In each of the other searches, one worker is on a second node: in a network
namespace that hangs on this machine by a pair of virtual interfaces, which lose every packet from a random
moment on, for a random time. Ray takes a node for dead after about half a minute; one that ends of it is
started again. Network namespaces take root, and Debian's iproute2.

Those of odd seeds have single whole trainings, and are compared with the same by one worker, in this process.
The others have rungs, replicates and, every other one, derived points, of which the order in which trials
finish decides which have them: they are compared with a search in this process that takes the noted order.
Every third search has warm starts. A fault is recovered where the call ends by itself with every trial's
values and the front as in the undisturbed search.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import ray
import torch

from autopeft import RayExecutor
from autopeft.core.evaluation import TrialRecord
from autopeft.core.jobs import Job
from autopeft.evaluation.executor import Executor, ExecutorFactory
from autopeft.evaluation.trial_runner import TrialRunner
from benchmarks.fault_studies import COLUMNS, TRIALS, counted_twice, processes_below, show, small_search
from benchmarks.machine import this_machine
from tests.learnable import outcomes

RESULTS = Path(__file__).parent / "results" / "worker_faults.json"
EACH = (*COLUMNS, "values differ", "front equal")
_NAMESPACE = "autopeft-faults"
# Of this machine, and of the namespace: how `ip` and `tc` are told, interface, address.
_SIDES = "", f"-n {_NAMESPACE}"
_LINKS = "autopeft-here", "autopeft-there"
_HOSTS = "10.177.0.1", "10.177.0.2"
_PORT = 6399
_LONGEST_END = 2.0
_LONGEST_CUT = 60.0
_LONGEST_START = 300.0

Fault = Callable[[], bool]
"""Does something to a worker; returns whether there was one."""


@dataclass(frozen=True)
class Order:
    """In which order an executor's jobs ended, and how many it would take before each."""

    free: list[int] = field(default_factory=list)
    finished: list[int | None] = field(default_factory=list)  # trials, and None for a worker that came


class _Noting:
    """An executor that notes the order."""

    serves_hidden_states = True

    def __init__(self, executor: Executor, order: Order) -> None:
        self._executor, self._order = executor, order
        self.submit, self.close = executor.submit, executor.close

    @property
    def at_once(self) -> int:
        return self._executor.at_once

    @property
    def free(self) -> int:
        self._order.free.append(self._executor.free)
        return self._order.free[-1]

    def wait(self) -> TrialRecord | None:
        record = self._executor.wait()
        self._order.finished.append(None if record is None else record.number)
        return record


class _Replaying:
    """An executor that runs jobs in this process, in an order that was noted."""

    serves_hidden_states = True
    at_once = 1

    def __init__(self, runner: TrialRunner, order: Order) -> None:
        self._run, self._jobs = runner.run, dict[int, Job]()
        self._free, self._finished = iter(order.free), iter(order.finished)

    @property
    def free(self) -> int:
        return next(self._free)

    def submit(self, job: Job) -> None:
        self._jobs[job.number] = job

    def wait(self) -> TrialRecord | None:
        number = next(self._finished)
        return None if number is None else self._run(self._jobs.pop(number))

    def close(self) -> None:
        self._jobs.clear()


@dataclass(frozen=True)
class Executors:
    """Makes an executor by a function; a search takes it for any other."""

    make: Callable[[TrialRunner], Executor]
    alters_trials = False

    def __call__(self, runner: TrialRunner) -> Executor:
        """Make one."""
        return self.make(runner)


class Found(NamedTuple):
    """What a search found."""

    trials: list[tuple[Any, ...]]
    statuses: dict[int, str]
    front: frozenset[int]


def disturb(seed: int, fault: Fault, draw: random.Random) -> dict[str, int] | None:
    """Run a search with a fault at a random moment; return what came of it, None where it came too late."""
    has_rungs = seed % 2 == 0
    settings: dict[str, Any] = {
        "has_rungs": has_rungs,
        "derive": seed % 4 == 0,
        "warm_start": seed % 3 == 0,
    }
    order, hits = Order(), list[bool]()
    with tempfile.TemporaryDirectory() as place:

        def found(folder: str, executor: str | ExecutorFactory) -> Found:
            search = small_search(Path(place, folder), seed, executor=executor, **settings)
            front = search.run(trials=TRIALS, progress=False)
            records = sorted(front.records, key=lambda record: record.number)
            return Found(
                outcomes(records), {each.number: each.evaluation.status for each in records}, front.members
            )

        started = time.monotonic()
        whole = found("whole", "local")
        moment = draw.random() * (time.monotonic() - started)
        timer = Timer(moment, lambda: hits.append(fault()))

        def disturbed(runner: TrialRunner) -> Executor:
            executor = RayExecutor(workers=2)(runner)
            timer.start()
            return _Noting(executor, order)

        came = found("disturbed", Executors(disturbed))
        timer.cancel()
        timer.join()
        if has_rungs:
            whole = found("replayed", Executors(lambda runner: _Replaying(runner, order)))
        twice = counted_twice(Path(place, "disturbed", "faults"))
    if not any(hits):
        return None
    recovered, front_equal = came == whole and not twice, came.front == whole.front
    lost = len(whole.statuses.items() - came.statuses.items())
    differ = sum(outcome not in came.trials for outcome in whole.trials) - lost
    values = (1, recovered, lost, twice, differ, front_equal)
    return dict(zip(EACH, map(int, values), strict=True))


def end_a_worker(how: signal.Signals, draw: random.Random) -> bool:
    """Send a signal to one of the worker processes below this process; return whether it is gone of it."""
    processes = sorted(filter(is_worker, processes_below(os.getpid())))
    if not processes:
        return False
    process = draw.choice(processes)
    until = time.monotonic() + _LONGEST_END  # later it may be gone because the search is over
    with suppress(ProcessLookupError):
        os.kill(process, how)
        while is_worker(process) and time.monotonic() < until:
            time.sleep(0.01)
        return not is_worker(process)
    return False


def is_worker(process: int) -> bool:
    """Return whether a process is one of Ray's workers."""
    with suppress(OSError):  # it has ended
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::_Worker")
    return False


class Cluster:
    """Ray's head on this machine, and a second node in a network namespace, with a core each."""

    def __init__(self) -> None:
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        _run(f"ip netns add {_NAMESPACE}")
        _run(f"ip link add {_LINKS[0]} type veth peer name {_LINKS[1]} netns {_NAMESPACE}")
        for where, link, host in zip(_SIDES, _LINKS, _HOSTS, strict=True):
            _run(f"ip {where} address add {host}/24 dev {link}")
            _run(f"ip {where} link set {link} up")
        _run(f"ip {_SIDES[1]} link set lo up")
        try:
            self._wait(self._is_connected)
        except BaseException:
            self.close()
            raise

    def _keep(self, host: str, *options: str) -> None:
        """Start a node unless it is running."""
        if host in self._nodes and self._nodes[host].poll() is None:
            return
        inside = [] if host == _HOSTS[0] else ["ip", "netns", "exec", _NAMESPACE]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *options]
        self._nodes[host] = subprocess.Popen(
            [*inside, *command, f"--node-ip-address={host}", "--disable-usage-stats"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _is_connected(self) -> bool:
        self._keep(_HOSTS[0], "--head", f"--port={_PORT}", "--include-dashboard=false")
        with suppress(ConnectionError):  # it is not there yet
            ray.init(f"{_HOSTS[0]}:{_PORT}", log_to_driver=False, logging_level=logging.ERROR)
        return bool(ray.is_initialized())

    def _wait(self, is_there: Callable[[], bool]) -> None:
        until = time.monotonic() + _LONGEST_START
        while not is_there():
            if time.monotonic() > until:
                raise RuntimeError(f"A node of Ray did not start within {_LONGEST_START:g} seconds.")
            time.sleep(1)

    def complete(self) -> None:
        """Start the second node where it is not there, and wait until Ray has both."""

        def is_complete() -> bool:
            self._keep(_HOSTS[1], f"--address={_HOSTS[0]}:{_PORT}")
            return bool(ray.cluster_resources().get("CPU", 0) == 2)

        self._wait(is_complete)

    def cut(self, seconds: float) -> bool:
        """Lose every packet between the nodes for a while."""
        for where, link in zip(_SIDES, _LINKS, strict=True):
            _run(f"tc {where} qdisc add dev {link} root bfifo limit 1")  # a queue that takes one byte
        time.sleep(seconds)
        for where, link in zip(_SIDES, _LINKS, strict=True):
            _run(f"tc {where} qdisc delete dev {link} root")
        return True

    def close(self) -> None:
        """End both nodes, and remove the namespace and with it the interfaces."""
        ray.shutdown()
        for node in self._nodes.values():
            node.terminate()
            node.wait()
        _run(f"ip netns delete {_NAMESPACE}")


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def main() -> None:
    """Disturb searches, write JSON after each kind of fault, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signals", type=int, default=4, help="SIGTERM")
    parser.add_argument("--cuts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else nodes ask for a token where the user has one
    draw = random.Random(arguments.seed)
    seeds = iter(range(arguments.seed, sys.maxsize))
    settings = " ".join(f"--{name} {value}" for name, value in vars(arguments).items())
    command = f"python -m benchmarks.worker_faults {settings}"
    counts: dict[str, Counter[str]] = {}

    def disturb_searches(kind: str, count: int, fault: Fault, prepare: Callable[[], None]) -> None:
        counts[kind] = Counter()
        while counts[kind]["injected"] < count:
            prepare()
            seed = next(seeds)
            came = disturb(seed, fault, draw)
            print(f"{kind}, seed {seed}: {came or 'came too late'}", flush=True)
            counts[kind].update(came or {})
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        record = {"command": command, "machine": this_machine(), **counts[kind]}
        RESULTS.write_text(json.dumps({**known, kind: record}, indent=1) + "\n")

    if arguments.kills or arguments.signals:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        for name, (how, times) in {
            "kill -9": (signal.SIGKILL, arguments.kills),
            "SIGTERM": (signal.SIGTERM, arguments.signals),
        }.items():
            if times:
                fault = partial(end_a_worker, how, draw)
                disturb_searches(f"{name} of a worker", times, fault, lambda: None)
        ray.shutdown()
    if arguments.cuts:
        with closing(Cluster()) as cluster:
            disturb_searches(
                "network to a worker cut",
                arguments.cuts,
                lambda: cluster.cut(draw.uniform(1, _LONGEST_CUT)),
                cluster.complete,
            )
    show(f"Searches of {TRIALS} trials by two workers of Ray", counts, EACH)


if __name__ == "__main__":
    main()
