"""Compute between two readings."""

from __future__ import annotations

import time

import torch

from autopeft.training.compute_meter import ComputeMeter


def test_a_reading_has_what_was_spent_since_the_one_before() -> None:
    meter = ComputeMeter(torch.device("cpu"))
    time.sleep(0.05)
    asleep = meter.read()
    started = time.process_time()
    while time.process_time() - started < 0.05:
        pass
    busy = meter.read(steps=3)
    assert asleep.wall_seconds >= 0.05
    assert asleep.cpu_seconds < 0.05 <= busy.cpu_seconds
    assert busy.wall_seconds >= 0.05
    assert (asleep.steps, busy.steps) == (0, 3)
    assert asleep.gpu_seconds == busy.gpu_seconds == 0
