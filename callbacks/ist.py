"""Train the layers that matter most, as found by suppressing others: IST."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

from autopeft.callbacks.lisa import LayerSampling, find_layers
from autopeft.callbacks.lora_modules import find_lora_modules, has_lora
from autopeft.core.errors import check_numbers


@dataclass(eq=False, kw_only=True)
class IST(LayerSampling):
    """Train a quarter of the layers, drawn anew at each step by an importance that is learned.

    Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in
    Parameter-efficient Fine-tuning of Large Language Models" (IST), 2024. Each layer has a score s, the
    higher the less important, from 0. Every few steps, a few times: half of the layers are drawn with
    probabilities p = sigmoid(s), their LoRA scaling is multiplied by 0.25, and the loss of the coming
    batch is computed (without gradient, without dropout). With the rewards R = exp(−loss) less their
    mean, each suppressed layer's score grows by η·R·p·(1 − p): suppressing what is unimportant does
    little harm. At each step the layers to train are drawn with probabilities sigmoid(−s).

    The loss is what the module's `training_step` returns, which is called once more for each trial (what
    it logs is logged again).

    Args:
        trained_share: Share of the layers that are trained at a time, in (0, 1].
        suppressed_share: Share of the layers that a trial suppresses, in (0, 1).
        suppression: What their scaling is multiplied by in a trial.
        trials: Trials at each update of the scores, at least 2.
        every_n_steps: Optimizer steps between updates of the scores.
        learning_rate: η > 0.
        seed: Seed of the draws.

    Raises:
        ValueError: An argument is out of range; when training starts: fewer than two layers have
            LoRA, or one is none whose scaling can be changed (see `find_lora_modules`).
    """

    trained_share: float = 0.25
    suppressed_share: float = 0.5
    suppression: float = 0.25
    trials: int = 3
    every_n_steps: int = 10
    learning_rate: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=2, trials=self.trials)
        check_numbers(above=0, learning_rate=self.learning_rate)
        shares = self.trained_share, self.suppressed_share
        if not 0 < shares[0] <= 1 or not 0 < shares[1] < 1:
            raise ValueError(f"trained_share lies in (0, 1] and suppressed_share in (0, 1), got {shares}.")
        self._choose_every = 1  # layers are drawn at every step, scores updated less often
        self._scores = torch.zeros(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers, and see whether each has LoRA."""
        super().on_train_start(trainer, pl_module)
        modules = find_lora_modules(pl_module)
        for layer in self.layers:
            if not any(name.startswith(f"{layer}.") for name in modules):
                raise ValueError(f"{layer} has trainable parameters but no LoRA layer to suppress.")
        if not len(self._scores):
            self._scores = torch.zeros(len(self.layers))
        if len(self._scores) != len(self.layers):
            raise ValueError(
                f"The scores in the callback's state are of {len(self._scores)} layers, this model has "
                f"{len(self.layers)}."
            )

    def applies_to(self, module: nn.Module) -> bool:
        """Return whether there are enough layers with trainable parameters, and LoRA in each of them."""
        layers = map(module.get_submodule, find_layers(module))
        return super().applies_to(module) and all(map(has_lora, layers))

    def importance(self) -> dict[str, float]:
        """Return sigmoid(−s) of every layer: the weight with which it is drawn for training."""
        return dict(zip(self.layers, torch.sigmoid(-self._scores).tolist(), strict=True))

    def choose(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> Collection[str]:
        """Update the scores where it is time, and draw layers to train."""
        step = trainer.global_step
        if step and step % self.every_n_steps == 0:
            draws = [self._draw(self._scores, self.suppressed_share) for _ in range(self.trials)]
            losses = [self._loss(trainer, pl_module, batch, batch_idx, draw) for draw in draws]
            self._scores += score_change(self._scores, draws, losses, learning_rate=self.learning_rate)
        return {self.layers[index] for index in self._draw(-self._scores, self.trained_share)}

    def _draw(self, logits: Tensor, share: float) -> list[int]:
        count = max(1, int(share * len(logits)))
        # A layer that is almost certainly not drawn must remain possible, else there may be too few.
        weights = torch.sigmoid(logits).clamp(min=1e-6)
        return sorted(torch.multinomial(weights, count, generator=self._generator).tolist())

    def _loss(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, draw: list[int]
    ) -> float:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(trainer.precision_plugin.train_step_context())
            stack.enter_context(_evaluating(pl_module))
            for index in draw:
                layer = pl_module.get_submodule(self.layers[index])
                stack.enter_context(rescale_adapter_scale(layer, self.suppression))
            output = pl_module.training_step(batch, batch_idx)
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(pl_module).__name__}.training_step returned {type(output).__name__}, expected a loss."
            )
        # Every process must come to the same scores.
        return float(trainer.strategy.reduce(loss.detach(), reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        """Return the scores and the state of the draws."""
        return {**super().state_dict(), "scores": self._scores.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        super().load_state_dict(state_dict)
        self._scores = state_dict["scores"].clone()


def score_change(
    scores: Tensor, draws: list[list[int]], losses: list[float], *, learning_rate: float
) -> Tensor:
    """Return by how much each layer's score s changes: Σ over trials of η·R·p·(1 − p), where suppressed.

    A trial has the indices of the layers that it suppressed, and its loss. Shapes are (layers,).
    """
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    probabilities = torch.sigmoid(scores)
    slopes = learning_rate * probabilities * (1 - probabilities)
    change = torch.zeros_like(scores)
    for draw, reward in zip(draws, rewards, strict=True):
        change[draw] += (reward - mean) * slopes[draw]
    return change


@contextmanager
def _evaluating(pl_module: LightningModule) -> Iterator[None]:
    """Put every module in evaluation mode, and each back in the mode it was in."""
    training = [module for module in pl_module.modules() if module.training]
    pl_module.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
