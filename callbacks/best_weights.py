"""Keep the trainable weights of the best validation in memory, and put them back at the end."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autopeft.callbacks.rank_gates import RankGates


@dataclass(eq=False)
class BestWeights(Callback):
    """Restore the best validation's weights when training ends.

    A `ModelCheckpoint` for models of which little is trained: only parameters that require gradients
    are copied, and nothing is written to disk. Where ranks have gates (`RankGates`), what is kept has them
    folded in: it computes what was validated.

    Args:
        monitor: Name of the metric to watch, as logged.
        mode: Whether more ("max") or less ("min") is better.
        restore_at_end: Whether to put the weights back when a fit ends. Steps after the last validation
            are then lost; False leaves it to the caller, who may validate once more before `restore`.

    Attributes:
        best: Value of the metric at the weights that are kept; NaN before the first validation.
        metrics: Every metric of that validation.
        weights: The weights that are kept, by the module's names; empty before the first validation.
    """

    monitor: str
    mode: Literal["max", "min"] = "max"
    _: KW_ONLY
    restore_at_end: bool = True

    def __post_init__(self) -> None:
        self.best = math.nan
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the weights where the metric is the best so far (the earliest, on a tie)."""
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"No metric {self.monitor!r} was logged; logged were: {known}.")
        value = float(trainer.callback_metrics[self.monitor])
        better = value > self.best if self.mode == "max" else value < self.best
        if math.isnan(self.best) or better:
            self.best = value
            self.metrics = {name: float(metric) for name, metric in trainer.callback_metrics.items()}
            self.weights = {
                name: parameter.detach().clone()
                for name, parameter in pl_module.named_parameters()
                if parameter.requires_grad
            }
            for gates in _rank_gates(trainer):
                self.weights |= gates.folded_weights()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back, unless the caller does."""
        if self.restore_at_end:
            for gates in _rank_gates(trainer):
                gates.fold()  # before the weights that already have them
            self.restore(pl_module)

    @torch.no_grad()
    def restore(self, pl_module: LightningModule) -> None:
        """Put the best weights back and let go of them."""
        for name, weights in self.weights.items():
            pl_module.get_parameter(name).copy_(weights)
        self.weights = {}


def _rank_gates(trainer: Trainer) -> list[RankGates]:
    return [callback for callback in getattr(trainer, "callbacks", []) if isinstance(callback, RankGates)]
