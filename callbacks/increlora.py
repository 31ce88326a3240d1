"""Give ranks to the modules that need them, while training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from autopeft.callbacks.rank_gates import refuse_loss_scaling
from autopeft.callbacks.smoothed_sensitivity import SensitivityGates
from autopeft.core.errors import check_numbers


@dataclass(eq=False, kw_only=True)
class IncreLoRA(SensitivityGates):
    """Let LoRA layers grow from a low rank: every few steps the most sensitive modules gain one.

    Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
    Fine-tuning", 2023. The sensitivity of a module is Σ|ΔW ⊙ ∇ΔW| / √(number of entries of ΔW), with
    ΔW = s·B·A and ∇ΔW the gradient of the loss; `SmoothedSensitivity` of it is the score. The paper adds
    parameters; here the layers are made with the largest rank they may reach, and ranks are switched on
    (see `RankGates`). With peft's default start (B = 0) a new rank changes nothing at first.

    With gradient accumulation the sensitivities of a step's backward passes are averaged. ∇ΔW is a full
    matrix, but there is one of them at a time.

    Args:
        budget: Ranks of all modules together, to be reached.
        every_n_steps: Optimizer steps between growths.
        modules_per_growth: Modules that gain a rank at each growth (the paper's h).
        initial_rank: Rank every module starts with, at least 1: without a rank there is no sensitivity.
        warmup_steps, betas: See `SensitivityGates`.

    Raises:
        ValueError: An argument is out of range; when a fit starts: the layers cannot hold the budget,
            they start beyond it, or the trainer takes too few steps to reach it.
    """

    modules_per_growth: int
    initial_rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=1, modules_per_growth=self.modules_per_growth, initial_rank=self.initial_rank)
        self._inputs: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self._growing = False

    def initial_gates(self) -> dict[str, Tensor]:
        """Return gates that are 1 for the first ranks."""
        self.check_budget(self.initial_rank)
        return self.first_ranks(dict.fromkeys(self._modules, self.initial_rank))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the gates on, and watch ∇ΔW."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.watch(self._keep_input)
            self.watch(self._watch_gradient, up=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the budget can be reached."""
        super().on_train_start(trainer, pl_module)
        refuse_loss_scaling(trainer, self)
        steps = trainer.estimated_stepping_batches
        missing = self._missing_ranks()
        self._growing = missing > 0
        growths = math.ceil(missing / self.modules_per_growth)
        start = max(self.warmup_steps, trainer.global_step)
        needed = (start // self.every_n_steps + growths) * self.every_n_steps
        if growths and steps < needed:
            raise ValueError(
                f"The budget of {self.budget} ranks is reached after step {needed} at the earliest, but "
                f"the trainer takes {steps} optimizer steps: grow more often or more modules at once."
            )

    def _keep_input(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self._growing and torch.is_grad_enabled():
            self._inputs[name] = inputs[0].detach()

    def _watch_gradient(self, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        hidden = self._inputs.pop(name, None)
        if hidden is not None and output.requires_grad:
            output.register_hook(partial(self._add_sensitivity, name, hidden))

    @torch.no_grad()
    def _add_sensitivity(self, name: str, hidden: Tensor, gradient: Tensor) -> None:
        """Add Σ|ΔW ⊙ ∇ΔW| / √numel of one backward pass.

        The gradient is that of B's output, s times that of the module's: the s that ΔW has and B·A lacks.
        """
        update = self._folded(name) @ self._modules[name].down.weight
        slope = gradient.flatten(0, -2).float().T @ hidden.flatten(0, -2).float()
        sensitivity = (update.float() * slope).abs().sum() / math.sqrt(update.numel())
        self._sums[name] = self._sums.get(name, torch.zeros_like(sensitivity)) + sensitivity

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the backward passes of the step."""
        self._passes += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Take the step's sensitivities into the averages."""
        if self._sums:
            means = torch.stack(list(self._sums.values())) / max(1, self._passes)
            # Every process must grow the same modules.
            means = trainer.strategy.reduce(means, reduce_op="mean")
            for name, mean in zip(self._sums, means, strict=True):
                self._averages.update(name, mean)
        self._sums, self._passes = {}, 0

    def _missing_ranks(self) -> int:
        return self.budget - sum(self.ranks().values())

    def scores(self) -> dict[str, float]:
        """Return the score of every module that took part in a loss so far."""
        means = self._averages.means
        return {name: float(self._averages.score(name)) for name in self._gates if name in means}

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Grow, where it is time."""
        if not self._growing or not self.is_due(step):
            return
        ranks, scores = self.ranks(), self.scores()
        free = [name for name in scores if ranks[name] < self._modules[name].rank]
        count = min(self.modules_per_growth, self._missing_ranks())
        for name in sorted(free, key=scores.__getitem__, reverse=True)[:count]:
            self._gates[name][ranks[name]] = 1
        self._growing = self._missing_ranks() > 0
