"""The LightningModule that trains a candidate with AdamW, linear warm-up and linear decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from autopeft.core.evaluation import VALIDATION_LOSS
from autopeft.methods.base import RATE
from autopeft.tasks import Batch, Task
from autopeft.tasks.batch import rows_key, rows_of
from autopeft.training.accumulation import TrainingBatch, loss_in_parts, with_shares

Serve = Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]]
"""Returns the context in which the forward pass of a batch runs."""


class FineTuning(LightningModule):
    """Train whatever requires gradients in a model with a task head.

    Args:
        model: The model, with whatever is trained in it.
        task: Gives the forward pass, the loss and the metrics.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay.
        warmup_share: Share of the steps with a rising learning rate.
        total_steps: Steps after which the learning rate is 0.
        first_step: Steps already taken.
        optimizer_state: The optimizer's tensors at that step, by "parameter|name"; None at the start.
        serve: Gives the context in which a batch's forward pass runs, as `HiddenStateCache.serve` does.
        metrics: The task's, which are reset; None to make new ones.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        learning_rate: float,
        weight_decay: float,
        warmup_share: float,
        total_steps: int,
        first_step: int = 0,
        optimizer_state: Mapping[str, Tensor] | None = None,
        serve: Serve = nullcontext,
        metrics: MetricCollection | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = math.ceil(warmup_share * total_steps)
        self.total_steps = total_steps
        self.first_step = first_step
        self.serve = serve
        self.optimizer_state = optimizer_state or {}
        self.metrics = task.metric_collection() if metrics is None else metrics
        self.metrics.reset()  # a training that failed may have left rows
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._adds_up = False

    @property
    def device(self) -> torch.device:
        """Where batches go: the first device of a model that lies on several."""
        return next(self.model.parameters()).device

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the model's output."""
        with self.serve(batch):
            return self.task.forward(self.model, batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch but for its row numbers: reading them later would wait for the device."""
        if isinstance(batch, list):
            return [self.transfer_batch_to_device(part, device, dataloader_idx) for part in batch]
        moved, rows = super().transfer_batch_to_device(batch, device, dataloader_idx), rows_of(batch)
        return moved if rows is None else moved | {rows_key(rows[0]): rows[1]}

    def training_step(self, batch: TrainingBatch, batch_index: int) -> Tensor:
        """Return the loss of one batch; of a batch in parts, all gradients but the last's are there then."""
        self._adds_up = isinstance(batch, list)
        if not isinstance(batch, list):
            return self._loss(batch)
        self.zero_grad()
        return loss_in_parts(with_shares(self.task, batch), self._loss)

    def _loss(self, batch: Batch) -> Tensor:
        return self.task.loss(self(batch), batch)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Free the gradients of the step before, where `training_step` has not done so."""
        if not self._adds_up:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Add one batch to the metrics and the loss."""
        self.add_validated(self(batch), batch)

    def add_validated(self, output: Any, batch: Mapping[str, Tensor]) -> None:
        """Add the model's output for one validation batch to the metrics and the loss."""
        loss = self.task.loss(output, batch)
        self.task.update_metrics(self.metrics, output, batch, loss)
        self._losses.append((loss.double(), self.task.weight(batch).double()))

    def take_validated(self) -> dict[str, Tensor]:
        """Return the metrics and the mean loss of what was added, by name, and forget it."""
        losses, weights = map(torch.stack, zip(*self._losses, strict=True))
        mean = (losses * weights).sum() / weights.sum()
        found = {**self.metrics.compute(), VALIDATION_LOSS: mean.float()}
        self.metrics.reset()
        self._losses = []
        return found

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and the loss under their names."""
        self.log_dict(self.take_validated())

    def test_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Add one batch to the metrics."""
        output = self(batch)
        self.task.update_metrics(self.metrics, output, batch, self.task.loss(output, batch))

    def on_test_epoch_end(self) -> None:
        """Log the metrics under their names."""
        self.log_dict(self.metrics.compute())
        self.metrics.reset()

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable parameters, with linear warm-up and decay a step.

        Each is trained at the multiple of the learning rate that `Method.rate` says.
        """
        trainable = {
            name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad
        }
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in trainable.values():
            groups.setdefault(getattr(parameter, RATE, 1.0), []).append(parameter)
        # AdamW decays by the product of rate and decay, which is to be the same for all.
        rated = [
            {"params": members, "lr": rate * self.learning_rate, "weight_decay": self.weight_decay / rate}
            for rate, members in groups.items()
        ]
        optimizer = torch.optim.AdamW(rated, lr=self.learning_rate)
        for key, tensor in self.optimizer_state.items():
            name, _, entry = key.rpartition("|")
            parameter = trainable[name]
            # AdamW counts steps on the CPU.
            device = tensor.device if entry == "step" else parameter.device
            optimizer.state[parameter][entry] = tensor.to(device, copy=True)
        scheduler = LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _learning_rate_factor(self, step: int) -> float:
        step += self.first_step
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))


def names_in_training(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Map the names in `parameters` to the names that a `FineTuning` of the model has for them."""
    names = {id(parameter): f"model.{name}" for name, parameter in model.named_parameters()}
    return {name: names[id(parameter)] for name, parameter in parameters.items()}
