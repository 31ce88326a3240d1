"""Measure how fast training goes, validation left out."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


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
