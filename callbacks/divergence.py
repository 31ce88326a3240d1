"""Stop a training that has diverged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autopeft.core.errors import check_numbers


class DivergenceError(RuntimeError):
    """The training loss is not finite, or beyond any use."""


@dataclass(eq=False)
class StopOnDivergence(Callback):
    """Raise `DivergenceError` once the training loss is NaN, infinite, or above a limit.

    Args:
        loss_limit: Highest loss to go on with.
        every_n_steps: How often to look; each look waits for the device.
    """

    loss_limit: float = 1e3
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        check_numbers(least=1, every_n_steps=self.every_n_steps)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of this step."""
        if trainer.global_step % self.every_n_steps:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        value = float(loss.detach()) if isinstance(loss, Tensor) else math.nan
        if not math.isfinite(value) or value > self.loss_limit:
            raise DivergenceError(f"the training loss was {value:g} at step {trainer.global_step}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the trained weights: a last step can break them without a loss that shows it."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise DivergenceError(f"{name} is not finite after training")
