"""LoRA-XS: a small square matrix between frozen singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter
from autopeft.methods.data_initialised import singular_vectors
from autopeft.methods.layer_adapter import LayerMethod, WeightUpdate, beyond_full_rank, weight_of
from autopeft.models.site_shapes import SiteShape


class BetweenSingularVectors(WeightUpdate):
    """U·Σ·R·Vᵀ, with the largest singular values of a weight and R = 0 to begin with.

    The frozen factors are kept with R, as a decomposition done again may turn the signs of vectors.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        left, values, right = singular_vectors(weight.float(), rank)
        self.core = nn.Parameter(torch.zeros(rank, rank))
        self.register_buffer("left", left * values)
        self.register_buffer("right", right.contiguous())
        self.left: Tensor
        self.right: Tensor

    def update(self, inputs: Tensor) -> Tensor:
        """Multiply by the three factors in turn."""
        inner = functional.linear(functional.linear(inputs, self.right), self.core)
        return functional.linear(inner, self.left)

    def weight(self) -> Tensor:
        """Multiply the factors."""
        return self.left @ self.core @ self.right


class LoraXS(LayerMethod):
    """LoRA-XS: an r × r matrix between the singular vectors of a weight, which stay as they are.

    Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024. R starts at
    0, where the paper draws numbers of 1e-5.
    """

    name = "lora_xs"

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: there are not so many singular values."""
        return beyond_full_rank(shape, adapter)

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r²."""
        return adapter.size_or_zero**2

    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> BetweenSingularVectors:
        """Return an update between a weight's singular vectors."""
        return BetweenSingularVectors(weight_of(layer, shape), adapter.size_or_zero)
