"""Learn how much each rank or each LoRA module contributes: ARD-LoRA."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from autopeft.callbacks.sora import SoRA
from autopeft.core.errors import check_numbers

Granularity = Literal["rank", "module"]


@dataclass(eq=False, kw_only=True)
class ARDLoRA(SoRA):
    """Learn a scale for every rank or every module, sparse and smooth over the depth of the network.

    Shinwari and Usama, "ARD-LoRA: Dynamic Rank Allocation for Parameter-Efficient Fine-Tuning of
    Foundation Models with Heterogeneous Adaptation Needs", 2025. Minimised is
    L + λ·Σ|α| + μ·Σ|α_l − α_(l+1)|: the loss, an L1 penalty, and the total variation between the same
    module of one block and the next. The L1 penalty is a proximal step (see `SoRA`), so that scales become
    exactly 0 and their ranks can be dropped; the total variation enters by its subgradient. Scales start
    at 1. The paper has one scale an attention head; peft's LoRA knows no heads.

    Args:
        penalty: λ ≥ 0.
        total_variation: μ ≥ 0.
        granularity: "rank" learns a scale for every rank, "module" one for all ranks of a module.
        learning_rate: η > 0 of the scales.

    Raises:
        ValueError: An argument is out of range; see `SoRA`.
    """

    total_variation: float = 0.0
    granularity: Granularity = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(least=0, total_variation=self.total_variation)
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity is 'rank' or 'module', got {self.granularity!r}.")

    def initial_gates(self) -> dict[str, Tensor]:
        """Return ones, of shape (rank,) or (1,)."""
        if self.granularity == "rank":
            return super().initial_gates()
        return {name: torch.ones(1) for name in self._modules}

    def factors(self, name: str) -> Tensor:
        """Return the scale of each rank of a module, of shape (rank,)."""
        return self._gates[name].expand(self._modules[name].rank)

    def scales(self) -> dict[str, Tensor]:
        """Return copies of the learned scales, by module, of shape (rank,) or (1,)."""
        return {name: gate.detach().clone() for name, gate in self._gates.items()}

    def extra_gradients(self) -> dict[str, Tensor]:
        """Return μ times a subgradient of the total variation."""
        gradients = {name: torch.zeros_like(gate) for name, gate in self._gates.items()}
        for name, following in neighbours(self._gates):
            here, there = self._gates[name], self._gates[following]
            shared = min(len(here), len(there))  # ranks may differ between blocks
            slope = self.total_variation * (here[:shared] - there[:shared].to(here)).sign()
            gradients[name][:shared] += slope
            gradients[following][:shared] -= slope.to(there)
        return gradients


def neighbours(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of consecutive modules that are called the same but for numbers."""
    rows: dict[str, list[str]] = {}
    for name in names:
        role = ".".join("*" if part.isdigit() else part for part in name.split("."))
        rows.setdefault(role, []).append(name)
    return [pair for row in rows.values() for pair in pairwise(row)]
