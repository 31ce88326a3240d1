"""Measure the peak of the CUDA allocator during training."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class PeakMemory(Callback):
    """Read `torch.cuda.max_memory_allocated` over a fit.

    Attributes:
        peak_bytes: Peak of live allocations on the module's device, what was there before included;
            None where the module is not on a CUDA device.
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peak."""
        if pl_module.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(pl_module.device)
