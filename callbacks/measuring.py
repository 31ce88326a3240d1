"""Callbacks that measure a training: its speed, its memory and its learning curves."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autopeft.models.spread import devices_of


def rows_in(batch: Any) -> int:
    """Return the rows of a batch's first tensor; of a batch in parts, of all of them."""
    if isinstance(batch, dict):
        return len(next(iter(batch.values())))
    return sum(map(rows_in, batch)) if isinstance(batch[0], dict) else len(batch[0])


class Throughput(Callback):
    """Time training epochs, without the validations between them.

    Attributes:
        steps: Batches trained on.
        examples: Rows of the batches' first tensor, added up.
        training_seconds: Elapsed time from each epoch's first batch to its last.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.examples = 0
        self.training_seconds = 0.0
        self._started = 0.0

    @property
    def examples_per_second(self) -> float:
        """Examples trained on a second; 0 before training."""
        return self.examples / self.training_seconds if self.training_seconds else 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; the time up to here is training."""
        self.steps += 1
        self.examples += rows_in(batch)
        if trainer.is_last_batch:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.training_seconds += time.perf_counter() - self._started


class PeakMemory(Callback):
    """Read `torch.cuda.max_memory_allocated` over a fit.

    Attributes:
        peak_bytes: Peak of live allocations on the module's devices, added up, what was there before
            included; None where the module is not on a CUDA device.
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        if pl_module.device.type == "cuda":
            for device in devices_of(pl_module):
                torch.cuda.reset_peak_memory_stats(device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peak."""
        if pl_module.device.type == "cuda":
            self.peak_bytes = sum(map(torch.cuda.max_memory_allocated, devices_of(pl_module)))


class LearningCurve(Callback):
    """Record the mean training loss between validations, and every metric logged in validation.

    Attributes:
        points: (metric, optimizer step, value), in the order in which they were recorded.
    """

    def __init__(self) -> None:
        self.points: list[tuple[str, int, float]] = []
        self._loss: Tensor | None = None
        self._batches = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up the loss on its device, without waiting for it."""
        loss = (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        self._loss = loss if self._loss is None else self._loss + loss
        self._batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close a section of the training loss and note the validation metrics."""
        if trainer.sanity_checking:
            return
        step = trainer.global_step
        if self._loss is not None:
            self.points.append(("training_loss", step, float(self._loss) / self._batches))
            self._loss, self._batches = None, 0
        for name, value in sorted(trainer.callback_metrics.items()):
            self.points.append((name, step, float(value)))
