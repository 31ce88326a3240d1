"""Sparse: single numbers of a weight are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter
from autopeft.methods.data_initialised import DataInitialised, HasWeight, Statistic
from autopeft.methods.layer_adapter import LayerMethod, WeightUpdate, weight_of
from autopeft.models.site_shapes import SiteShape


class SparseUpdate(WeightUpdate):
    """An update of `entries` numbers of a layer's weight, 0 to begin with: the largest, or any.

    The choice is kept with the values, as the same weights may be loaded in another type where they are
    trained on and served.
    """

    def __init__(self, layer: nn.Module, shape: SiteShape, entries: int, choice: str) -> None:
        super().__init__()
        weight = weight_of(layer, shape)
        scores = torch.rand(weight.shape, device=weight.device) if choice == "random" else weight.abs()
        self.values = nn.Parameter(torch.zeros(entries))
        self.register_buffer("indices", places_of_largest(scores, entries))
        self.indices: Tensor
        self.shape = (shape.out_features, shape.in_features)

    def update(self, inputs: Tensor) -> Tensor:
        """Multiply by the sparse matrix."""
        product: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
            inputs, self.values, self.indices, self.shape
        )
        return product

    def weight(self) -> Tensor:
        """Return the update with its zeros."""
        return _dense(self.values, self.indices, self.shape)


def places_of_largest(scores: Tensor, count: int) -> Tensor:
    """Return where the largest of a matrix are, rising; of equal ones the first, on every machine."""
    flat = scores.flatten()
    least = flat.topk(count).values[-1]  # to sort them all would take several times as long
    # Of a size that is known on the meta device too: -1 behind the places that there are.
    places = [chosen.nonzero_static(size=count).flatten() for chosen in (flat > least, flat == least)]
    found = torch.cat(places)
    return found[(found < 0).argsort(stable=True)][:count].sort().values.int()


class _SparseLinear(torch.autograd.Function):
    """A product with a matrix that is made anew in the backward pass: kept, it would take a weight's memory.

    torch's sparse products would not do: their gradients have no shape without data, so that memory could not
    be counted.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(inputs, values, indices)
        ctx.shape = shape
        return functional.linear(inputs, _dense(values, indices, shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, values, indices = ctx.saved_tensors
        (of_output,) = gradients
        of_inputs = of_values = None
        if ctx.needs_input_grad[0]:
            of_inputs = (of_output @ _dense(values, indices, ctx.shape).to(of_output.dtype)).to(inputs.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = of_output.flatten(0, -2).mT @ inputs.flatten(0, -2).to(of_output.dtype)
            of_values = of_weight.flatten().index_select(0, indices).to(values.dtype)
        return of_inputs, of_values, None, None


def _dense(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    return values.new_zeros(shape[0] * shape[1]).index_add(0, indices, values).view(shape)


class ChosenNumbers(DataInitialised):
    """A method whose option `choice` says which numbers of a weight are trained."""

    statistic: Statistic = "mean gradient"

    def begins_from_data(self, adapter: Adapter) -> bool:
        """Return whether the gradient chooses."""
        return adapter.option("choice") == "gradient"


class Sparse(ChosenNumbers, LayerMethod):
    """Sparse fine-tuning: `size` numbers of a linear layer's weight are trained.

    Liu et al., "Refining Salience-Aware Sparse Fine-Tuning Strategies for Language Models", 2024 (SPEFT). The
    option `choice` says which: those of the largest "magnitude", which needs no data; of the largest
    "gradient", in magnitude and averaged over the first batches of each training; or any ("random": Bhardwaj
    et al., "Sparse High Rank Adapters", 2024). Attached without data, "gradient" is as "magnitude".
    """

    name = "sparse"

    def initial_values(self, adapter: Adapter, statistic: Tensor, layer: HasWeight) -> dict[str, Tensor]:
        """Return which numbers are trained; see `DataInitialised.initial_values`."""
        return {"indices": places_of_largest(statistic.abs(), adapter.size_or_zero)}

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: there are not so many numbers."""
        numbers = shape.in_features * shape.out_features
        return f"its weight has {numbers:,} numbers" if adapter.size_or_zero > numbers else None

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the number of entries."""
        return adapter.size_or_zero

    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> SparseUpdate:
        """Return an update of the chosen numbers."""
        return SparseUpdate(layer, shape, adapter.size_or_zero, str(adapter.option("choice")))
