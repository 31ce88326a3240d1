"""The smoothed sensitivity by which AdaLoRA and its successors compare what is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SmoothedSensitivity:
    """Moving averages of a sensitivity and of its uncertainty, and their product as a score.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023,
    equations 8 to 10: Ī ← β₁·Ī + (1 − β₁)·I; U ← β₂·U + (1 − β₂)·|I − Ī|; s = Ī·U. Both start at 0.

    Args:
        betas: β₁ and β₂, each in (0, 1).

    Raises:
        ValueError: A beta is out of its range.
    """

    def __init__(self, betas: tuple[float, float] = (0.85, 0.85)) -> None:
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"Both betas lie in (0, 1), got {betas!r}.")
        self.betas = betas
        self._means: dict[str, Tensor] = {}
        self._uncertainties: dict[str, Tensor] = {}

    def update(self, name: str, sensitivity: Tensor) -> None:
        """Take in the sensitivity I of one step, of any shape."""
        mean = self._means.get(name, torch.zeros_like(sensitivity)).to(sensitivity)
        uncertainty = self._uncertainties.get(name, torch.zeros_like(sensitivity)).to(sensitivity)
        mean = self.betas[0] * mean + (1 - self.betas[0]) * sensitivity
        deviation = (sensitivity - mean).abs()
        self._means[name] = mean
        self._uncertainties[name] = self.betas[1] * uncertainty + (1 - self.betas[1]) * deviation

    def score(self, name: str) -> Tensor:
        """Return s, of the shape of what was taken in."""
        return self._means[name] * self._uncertainties[name]

    def forget(self, name: str, index: tuple[slice | int, ...]) -> None:
        """Start anew for a part of one tensor."""
        self._means[name][index] = 0
        self._uncertainties[name][index] = 0

    def __contains__(self, name: str) -> bool:
        return name in self._means

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"means": dict(self._means), "uncertainties": dict(self._uncertainties)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over averages."""
        self._means = {name: mean.clone() for name, mean in state_dict["means"].items()}
        self._uncertainties = {
            name: uncertainty.clone() for name, uncertainty in state_dict["uncertainties"].items()
        }
