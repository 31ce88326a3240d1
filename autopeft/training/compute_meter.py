"""Compute spent, between one reading and the next."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import torch

from autopeft.core.evaluation import Cost


@dataclass
class ComputeMeter:
    """Compute on a device since the latest reading, whose times in seconds it holds, or since it was made."""

    device: torch.device
    wall: float = field(default_factory=time.perf_counter)
    processor: float = field(default_factory=time.process_time)

    def read(self, steps: int = 0) -> Cost:
        """Return the compute since the latest reading, with the optimizer steps that were taken."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            with contextlib.suppress(RuntimeError):  # work that failed on the device fails again here
                torch.cuda.synchronize(self.device)
        wall, processor = time.perf_counter(), time.process_time()
        elapsed = wall - self.wall
        spent = Cost(
            wall_seconds=elapsed,
            cpu_seconds=processor - self.processor,
            gpu_seconds=elapsed if on_gpu else 0.0,
            steps=steps,
        )
        self.wall, self.processor = wall, processor
        return spent
