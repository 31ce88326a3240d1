"""Which faults of Ray's workers count."""

from __future__ import annotations

import random
import signal
import subprocess

import pytest


@pytest.mark.slow
def test_a_signal_counts_where_the_worker_is_gone_of_it() -> None:
    """Ray blocks SIGINT in what it starts."""
    pytest.importorskip("ray", reason="needs the extra autopeft[ray]")
    from benchmarks.worker_faults import end_a_worker

    draw = random.Random(0)
    assert not end_a_worker(signal.SIGKILL, draw), "there is none"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    worker = subprocess.Popen(["ray::_Worker", "60"], executable="sleep")
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        assert not end_a_worker(signal.SIGINT, draw)
        assert worker.poll() is None
        assert end_a_worker(signal.SIGTERM, draw)
    finally:
        worker.kill()
        worker.wait()
