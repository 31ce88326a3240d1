"""Linear layers whose frozen weight lies packed in four bits, for counting alone.

bitsandbytes' own layers keep part of their state outside their parameters, so that they do not run on
tensors without data. These stand-ins hold as many bytes and make the same temporary: the weight of one layer,
unpacked for a product and again for its backward pass (as in QLoRA, Dettmers et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

_BLOCK = 64
"""Weights that share a scale."""
_SCALES = 256
"""Scales that share a scale of their own."""


class _Product(torch.autograd.Function):
    """x Wᵀ, with W unpacked when it is needed."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = rows, inputs.shape[-1]
        return inputs @ inputs.new_empty(ctx.shape).mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None


class PackedLinear(nn.Linear):
    """A linear layer of the sizes of another one, with a weight of half a byte a number.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: The layer's bias, which is not packed; None where it has none.
        device: Where the stand-in's tensors lie.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, device: torch.device
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        numbers = in_features * out_features
        scales = -(-numbers // _BLOCK)

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        self.weight = nn.Parameter(empty(-(-numbers // 2), torch.uint8), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        self.register_buffer("scales", empty(scales, torch.uint8))
        self.register_buffer("scales_of_scales", empty(-(-scales // _SCALES), torch.float32))

    @classmethod
    def like(cls, layer: nn.Linear) -> Self:
        """Return a stand-in for a layer."""
        return cls(layer.in_features, layer.out_features, layer.bias, layer.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        """Return the product in bfloat16, in the type of the input."""
        found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            input.to(torch.bfloat16), self.weight, self.out_features
        )
        if self.bias is not None:
            found = found + self.bias.to(found.dtype)
        return found.to(input.dtype)


@contextmanager
def with_packed_stand_ins(model: nn.Module) -> Iterator[None]:
    """Put stand-ins in place of a model's 4-bit layers in a `with` block."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and hasattr(child.weight, "quant_state"):
                replaced.append((parent, name, child))
                setattr(parent, name, PackedLinear.like(child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def pack(model: nn.Module, names: Iterable[str]) -> None:
    """Put stand-ins in place of a model's linear layers, for good.

    Args:
        model: On any device; of the layers, sizes alone are read.
        names: Qualified names of the layers.
    """
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            parent, _, local = name.rpartition(".")
            setattr(model.get_submodule(parent), local, PackedLinear.like(layer))
