"""What callbacks that decide about the ranks of LoRA layers have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autopeft.callbacks.lora_modules import LoraModule, find_lora_modules, has_lora


class StepCallback(Callback):
    """A callback that does something after each optimizer step, whatever the gradient accumulation."""

    _last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the training starts: a resumed one not at 0."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Call `after_step` where this batch ended with an optimizer step."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self.after_step(trainer, pl_module, trainer.global_step)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Act after the step-th optimizer step, counted from 1; its gradients are still there."""


@dataclass(eq=False)
class RankGates(StepCallback):
    """Multiply every rank of every trainable LoRA layer by a gate: y = W·x + s·B·(g ⊙ A·x).

    The gates act while the model is fitted, in validation too. A rank whose gate is 0 contributes
    exactly nothing and its row of A and column of B get a gradient of exactly 0. When the fit ends (also
    by an exception) the gates are folded into B and those that were not 0 become 1: the model computes the
    same without the callback. Layers that are frozen when the fit starts are left alone.

    A checkpoint written during training holds weights without gates, which are in the callback's state. A
    callback that puts back weights of an earlier step alone takes those of `folded_weights`.

    Guarantee (tested for every subclass): in the fitted model the columns of B are 0 of all ranks but those
    that `ranks()` counts.

    Raises:
        ValueError: When a fit starts and the module has no LoRA layer, or one without separable ranks
            (see `find_lora_modules`), or other ones than the gates in the callback's state belong to.
    """

    def __post_init__(self) -> None:
        self._modules: dict[str, LoraModule] = {}
        self._gates: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def initial_gates(self) -> dict[str, Tensor]:
        """Return the gates a training starts with, by module: ones, as many as the module has ranks."""
        return {name: torch.ones(module.rank) for name, module in self._modules.items()}

    def applies_to(self, module: nn.Module) -> bool:
        """Return whether a model has a trainable LoRA layer."""
        return has_lora(module)

    def factors(self, name: str) -> Tensor:
        """Return what each rank of a module is multiplied by, of shape (rank,)."""
        return self._gates[name]

    def ranks(self) -> Mapping[str, int]:
        """Return the effective rank of every module, by its qualified name in the LightningModule."""
        return {name: int(torch.count_nonzero(self.factors(name))) for name in self._gates}

    @torch.no_grad()
    def folded_weights(self) -> dict[str, Tensor]:
        """Return copies of every B times its gates, under the parameters' names in the LightningModule."""
        return {
            f"{name}.lora_B.{module.adapter}.weight": self._folded(name)
            for name, module in self._modules.items()
            if self._handles
        }

    def _folded(self, name: str) -> Tensor:
        """Return B times its gates."""
        up = self._modules[name].up.weight
        return up * self.factors(name).to(up)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers, and put gates on them where this is a fit."""
        if stage != "fit":
            return
        self._modules = find_lora_modules(pl_module)
        self._gates = self._gates or self.initial_gates()
        self._check_gates()
        self.watch(self._gate)

    def watch(self, act: Callable[[str, nn.Module, Any, Tensor], Tensor | None], *, up: bool = False) -> None:
        """Run a forward hook on A (or on B) of every module, with the module's name first."""
        for name, module in self._modules.items():
            target = module.up if up else module.down
            self._handles.append(target.register_forward_hook(partial(act, name)))

    def _gate(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.factors(name).to(output)

    def _check_gates(self) -> None:
        shapes = {name: gate.shape for name, gate in self._gates.items()}
        expected = {name: gate.shape for name, gate in self.initial_gates().items()}
        differing = sorted({name for name, _ in shapes.items() ^ expected.items()})
        if differing:
            raise ValueError(
                f"The gates in the callback's state belong to other LoRA layers: {len(differing)} differ, "
                f"the first is {differing[0]}. Use a new {type(self).__name__} for another model."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put each gate on its module's device."""
        for name, module in self._modules.items():
            self._gates[name] = self._gates[name].to(module.down.weight.device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fold the gates into the weights."""
        self.fold()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Fold the gates into the weights: an exception must not leave hooks in the model."""
        self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply every B by its gates, and take the gates off; nothing where none are on."""
        if not self._handles:
            return
        while self._handles:
            self._handles.pop().remove()
        for name, module in self._modules.items():
            module.up.weight.copy_(self._folded(name))
            self._gates[name] = (self._gates[name] != 0).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the gates."""
        return {"gates": {name: gate.detach().clone() for name, gate in self._gates.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over gates; raise a ValueError where they belong to other layers than those being fitted."""
        self._gates = {name: gate.clone() for name, gate in state_dict["gates"].items()}
        if self._modules:
            self._check_gates()


def refuse_loss_scaling(trainer: Trainer, callback: Callback) -> None:
    """Raise a ValueError where the loss is scaled, as in 16-mixed: gradients are then no gradients of it."""
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{type(callback).__name__} reads gradients during the backward pass, which precision "
            "16-mixed scales: train in bf16-mixed or 32-true."
        )
