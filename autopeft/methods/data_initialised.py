"""Initial values that come from the training data, of LoRA above all: what such methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter
from autopeft.methods.layer_adapter import LayerMethod, WeightUpdate
from autopeft.methods.lora import lora_scaling
from autopeft.models.site_shapes import SiteShape

Statistic = Literal["input directions", "second moment", "mean gradient"]
"""What is found out about a layer on the first training batches, as a matrix in single precision.

* "input directions" (at most the largest rank, in): principal components of the layer's inputs, of length 1;
* "second moment" (in, in): the sum of xxᵀ over the inputs;
* "mean gradient" (out, in): the loss' gradient with respect to the weight, averaged over the batches.
"""


class HasWeight(Protocol):
    """A linear layer."""

    @property
    def weight(self) -> Tensor:
        """(out, in); where it is packed, it is unpacked each time."""


class DataInitialised(ABC):
    """A method whose initial values `autopeft.evaluation` computes; without data it begins with others."""

    statistic: Statistic
    """What its initial values are made of."""

    def begins_from_data(self, adapter: Adapter) -> bool:
        """Return whether an adapter's options have it so."""
        return True

    @abstractmethod
    def initial_values(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> dict[str, Tensor]:
        """Return initial values by the tensors' names at a site; of fewer rows, the first ones are replaced.

        Args:
            adapter: What is attached.
            statistic: See `Statistic`.
            layer: The layer.
        """


class LoraFromData(DataInitialised):
    """A method that is LoRA but for its initial values, and exported as LoRA.

    Attached without data it begins as LoRA does: A drawn, B = 0.
    """

    @abstractmethod
    def as_lora(self, adapter: Adapter) -> Adapter:
        """Return the LoRA that can compute what the adapter does."""

    @abstractmethod
    def lora_factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return A and B of that LoRA, from the tensors of a site by name."""


class UpdateSinceStart(WeightUpdate):
    """s·(B·A − B₀·A₀): what has become of a LoRA since its start, so that weights stay as they are.

    It is computed as (B − B₀)·A + B₀·(A − A₀): differences of parameters are exact in their precision, those
    of outputs in bfloat16 would not be. A₀ and B₀ are kept with A and B.
    """

    def __init__(self, shape: SiteShape, rank: int, scaling: float) -> None:
        super().__init__()
        self.down = nn.Linear(shape.in_features, rank, bias=False)
        self.up = nn.Linear(rank, shape.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.register_buffer("first_down", self.down.weight.detach().clone())
        self.register_buffer("first_up", self.up.weight.detach().clone())
        self.first_down: Tensor
        self.first_up: Tensor
        self.scaling = scaling

    def update(self, inputs: Tensor) -> Tensor:
        """Add both products."""
        down, up = self.down.weight, self.up.weight
        since = functional.linear(functional.linear(inputs, down), up - self.first_up)
        since = since + functional.linear(functional.linear(inputs, down - self.first_down), self.first_up)
        return self.scaling * since

    def weight(self) -> Tensor:
        """Subtract the matrices."""
        return self.scaling * (self.up.weight @ self.down.weight - self.first_up @ self.first_down)


class OffsetLora(LoraFromData, LayerMethod):
    """A LoRA that does not begin with B = 0, less what it begins with; α is scaled as in rsLoRA.

    The papers take s·B₀·A₀ out of the weight instead, which a quantised one would not bear.
    """

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·(d_in + d_out)."""
        return adapter.size_or_zero * (shape.in_features + shape.out_features)

    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> UpdateSinceStart:
        """Return an update that begins as LoRA does."""
        return UpdateSinceStart(shape, adapter.size_or_zero, lora_scaling(adapter))

    @abstractmethod
    def factors(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> tuple[Tensor, Tensor]:
        """Return A₀ (rank, in) and B₀ (out, rank); for the arguments see `initial_values`."""

    def initial_values(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> dict[str, Tensor]:
        """Return A = A₀ and B = B₀; see `DataInitialised.initial_values`."""
        down, up = self.factors(adapter, statistic, layer)
        return {"down.weight": down, "first_down": down, "up.weight": up, "first_up": up}

    def as_lora(self, adapter: Adapter) -> Adapter:
        """Return a LoRA of twice the rank, with the same α."""
        return Adapter("lora", 2 * adapter.size_or_zero, {"alpha": adapter.option("alpha")})

    def lora_factors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Stack the factors of both products; α/√(2r) is smaller than α/√r by √2."""
        down, up, first_down, first_up = (
            tensors[name] for name in ("down.weight", "up.weight", "first_down", "first_up")
        )
        return torch.cat((down, down - first_down)), 2**0.5 * torch.cat((up - first_up, first_up), dim=1)


def singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors and values: U (rows, count), σ, Vᵀ (count, columns).

    By `torch.svd_lowrank` with q = 2·count, as in peft's LoRA-GA; it draws from torch's global generator.
    """
    left, sigma, right = torch.svd_lowrank(matrix, q=min(2 * count, *matrix.shape), niter=4)
    return left[:, :count], sigma[:count], right[:, :count].mT
