"""Ranks that are switched on and off, within a budget, by a smoothed sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from autopeft.callbacks.rank_gates import RankGates
from autopeft.core.errors import check_numbers


class SmoothedSensitivity:
    """Moving averages of a sensitivity and of its uncertainty, and their product as a score.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023,
    equations 8 to 10: Ī ← β₁·Ī + (1 − β₁)·I; U ← β₂·U + (1 − β₂)·|I − Ī|; s = Ī·U. Both start at 0.

    β₁ and β₂ have to lie in (0, 1), else a ValueError is raised. `means` has Ī and `uncertainties` U by name.
    """

    def __init__(self, betas: tuple[float, float] = (0.85, 0.85)) -> None:
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"Both betas lie in (0, 1), got {betas!r}.")
        self.betas = betas
        self.means: dict[str, Tensor] = {}
        self.uncertainties: dict[str, Tensor] = {}

    def update(self, name: str, sensitivity: Tensor) -> None:
        """Take in the sensitivity I of one step, of any shape."""
        zeros = torch.zeros_like(sensitivity)
        mean = self.means.get(name, zeros).to(sensitivity)
        uncertainty = self.uncertainties.get(name, zeros).to(sensitivity)
        mean = self.betas[0] * mean + (1 - self.betas[0]) * sensitivity
        deviation = (sensitivity - mean).abs()
        self.means[name] = mean
        self.uncertainties[name] = self.betas[1] * uncertainty + (1 - self.betas[1]) * deviation

    def score(self, name: str) -> Tensor:
        """Return s, of the shape of what was taken in."""
        return self.means[name] * self.uncertainties[name]


@dataclass(eq=False)
class SensitivityGates(RankGates):
    """What IncreLoRA and ElaLoRA share: a budget of ranks, steps at which they change, averages of scores.

    Args:
        budget: Ranks of all modules together.
        every_n_steps: Optimizer steps between changes of the ranks.
        warmup_steps: Optimizer steps before the first change.
        betas: Decay of the averages of sensitivity and uncertainty.
    """

    budget: int
    _: KW_ONLY
    every_n_steps: int
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.85, 0.85)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=1, budget=self.budget, every_n_steps=self.every_n_steps)
        check_numbers(least=0, warmup_steps=self.warmup_steps)
        self._averages = SmoothedSensitivity(self.betas)

    def check_budget(self, least: int) -> None:
        """Raise a ValueError where layers that have a least rank each cannot have the budget together."""
        ranks = [module.rank for module in self._modules.values()]
        if least > min(ranks) or not least * len(ranks) <= self.budget <= sum(ranks):
            raise ValueError(
                f"{len(ranks)} LoRA layers of ranks from {least} to {min(ranks)}..{max(ranks)}, {sum(ranks)} "
                f"together, cannot hold a budget of {self.budget}."
            )

    def first_ranks(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Return gates that are 1 for so many first ranks of each module."""
        return {
            name: (torch.arange(module.rank) < counts[name]).float() for name, module in self._modules.items()
        }

    def is_due(self, step: int) -> bool:
        """Return whether ranks change after an optimizer step."""
        return step > self.warmup_steps and step % self.every_n_steps == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the gates and the averages."""
        averages = {"means": dict(self._averages.means), "uncertainties": dict(self._averages.uncertainties)}
        return {**super().state_dict(), "averages": averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over gates and averages."""
        super().load_state_dict(state_dict)
        for name, averages in state_dict["averages"].items():
            setattr(self._averages, name, {key: average.clone() for key, average in averages.items()})
