"""Learn which ranks of a LoRA are needed: SoRA."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from autopeft.callbacks.rank_gates import RankGates, refuse_loss_scaling
from autopeft.core.errors import check_numbers


@dataclass(eq=False)
class SoRA(RankGates):
    """Learn a gate for every rank, and drop the ranks whose gate falls to exactly 0.

    Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models" (SoRA), 2023:
    y = W·x + s·B·(g ⊙ A·x), and after each optimizer step g ← T_ηλ(g − η·∂L/∂g), with T the soft threshold.
    Gates start at 1, that is, as an ordinary LoRA. A gate at 0 comes back where |∂L/∂g| exceeds λ. The gates
    are the callback's own: the module's optimizer, gradient clipping and weight decay leave them alone.

    Args:
        penalty: λ ≥ 0, in units of the loss a unit of gate: a gate dies where its gradient stays below it.
        learning_rate: η > 0 of the gates. The shrinkage a step is η·λ.

    Raises:
        ValueError: An argument is out of range; when training starts in a precision that scales the loss;
            see `RankGates`.
    """

    penalty: float
    _: KW_ONLY
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=0, penalty=self.penalty)
        check_numbers(above=0, learning_rate=self.learning_rate)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put each gate on its module's device, and let it collect gradients."""
        super().on_fit_start(trainer, pl_module)
        self._gates = {name: gate.detach().requires_grad_() for name, gate in self._gates.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse precisions in which the gates' gradients would be scaled."""
        super().on_train_start(trainer, pl_module)
        refuse_loss_scaling(trainer, self)

    def extra_gradients(self) -> dict[str, Tensor]:
        """Return what is added to the gradients of the loss, by module."""
        return {}

    @torch.no_grad()
    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Take the proximal gradient step."""
        extra = self.extra_gradients()
        for name, gate in self._gates.items():
            gradient = torch.zeros_like(gate) if gate.grad is None else gate.grad
            gradient = trainer.strategy.reduce(gradient, reduce_op="mean")
            descended = gate - self.learning_rate * (gradient + extra.get(name, 0.0))
            gate.copy_(nn.functional.softshrink(descended, self.learning_rate * self.penalty))
            gate.grad = None
