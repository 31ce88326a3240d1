"""Train some layers of a network at a time: what layer sampling has in common, and LISA."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from autopeft.core.errors import check_numbers


@dataclass(eq=False, kw_only=True)
class LayerSampling(Callback):
    """Freeze all layers but those that a subclass chooses, before an optimizer step.

    A layer is an entry of an outermost `nn.ModuleList` (of two entries or more) that has trainable
    parameters when training starts; what is trainable outside of layers (embeddings, head) is trained
    throughout. A frozen parameter gets no gradient, so the optimizer neither moves nor decays it, and
    keeps its state. In validation and after training everything is trainable again, so that callbacks
    which go by `requires_grad` see it all.

    Under `DistributedDataParallel` the strategy has to look for unused parameters.

    Attributes:
        every_n_steps: Optimizer steps between choices.
        seed: Seed of everything random, the same in every process.
        active: Names of the layers that are trained, from the latest choice.
    """

    every_n_steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(least=1, every_n_steps=self.every_n_steps)
        self.active: tuple[str, ...] = ()
        self._choose_every = self.every_n_steps
        self._fewest_layers = 2
        self._generator = torch.Generator().manual_seed(self.seed)
        self._layers: dict[str, list[nn.Parameter]] = {}
        self._chosen_at: int | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all layers that are sampled from, in the module's order; empty before training."""
        return tuple(self._layers)

    def applies_to(self, module: nn.Module) -> bool:
        """Return whether a model has enough layers to sample from."""
        return len(find_layers(module)) >= self._fewest_layers

    def choose(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> Collection[str]:
        """Return the layers to train from this optimizer step on."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self._layers = find_layers(pl_module)
        if len(self._layers) < self._fewest_layers:
            raise ValueError(
                f"{type(pl_module).__name__} has {len(self._layers)} layers with trainable parameters "
                f"(entries of an nn.ModuleList), expected at least {self._fewest_layers} to draw from."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose where it is time, and freeze the others."""
        step = trainer.global_step
        # Several batches may make one optimizer step.
        if step != self._chosen_at and (step % self._choose_every == 0 or not self.active):
            chosen = self.choose(trainer, pl_module, batch, batch_idx)
            self.active = tuple(name for name in self._layers if name in chosen)
            self._chosen_at = step
        for name, parameters in self._layers.items():
            for parameter in parameters:
                parameter.requires_grad_(name in self.active)
                if name not in self.active:
                    parameter.grad = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make everything trainable; the next training batch freezes again."""
        for parameters in self._layers.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    on_train_end = on_validation_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make everything trainable: an exception must not leave layers frozen."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the latest choice and the generator's state."""
        return {
            "active": list(self.active),
            "chosen_at": self._chosen_at,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self.active = tuple(state_dict["active"])
        self._chosen_at = state_dict["chosen_at"]
        self._generator.set_state(state_dict["generator"])


def find_layers(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of each layer by its name; see `LayerSampling` for what is one."""
    layers: dict[str, list[nn.Parameter]] = {}
    inside: tuple[str, ...] = ()
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or len(part) < 2 or name.startswith(inside or "\0"):
            continue
        inside += (f"{name}.",)
        for index, entry in enumerate(part):
            trainable = [parameter for parameter in entry.parameters() if parameter.requires_grad]
            if trainable:
                layers[f"{name}.{index}"] = trainable
    return layers


@dataclass(eq=False)
class LISA(LayerSampling):
    """Train a few layers drawn at random, and others after every few steps.

    Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
    Fine-Tuning", 2024: every layer is drawn with the same probability (without replacement);
    embeddings and head are trained throughout. Works for full fine-tuning, as in the paper, and for
    adapters.

    Args:
        count: Layers that are trained at a time.
        every_n_steps: Optimizer steps after which others are drawn.
        seed: Seed of the draws.

    Raises:
        ValueError: An argument is out of range; when training starts: there are fewer layers than `count`.
    """

    count: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=1, count=self.count)
        self._fewest_layers = max(2, self.count)

    def choose(self, *_: Any) -> Collection[str]:
        """Draw layers."""
        order = torch.randperm(len(self.layers), generator=self._generator).tolist()
        return {self.layers[index] for index in order[: self.count]}
