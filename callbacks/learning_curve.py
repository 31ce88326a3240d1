"""Record learning curves without a logger."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


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
