"""Linear layers whose frozen weight lies packed in four or eight bits, for counting alone.

bitsandbytes' own layers keep part of their state outside their parameters, so that they do not run on
tensors without data. These stand-ins hold as many bytes and make the same temporary: the weight of one layer,
unpacked for a product and again for its backward pass (as in QLoRA, Dettmers et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autopeft.models.block_discovery import linear_sizes
from autopeft.models.quantized_layers import is_quantized

Bits = Literal[4, 8]
_BLOCK = 64
"""4-bit weights that share a scale."""
_SCALES = 256
"""Scales that share a scale of their own."""


class _Product(torch.autograd.Function):
    """x Wᵀ, with W unpacked when it is needed; of an 8-bit one, bitsandbytes keeps x too."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, rows: int) -> Tensor:
        ctx.kept = packed, inputs if packed.dtype == torch.int8 else None
        ctx.shape, ctx.dtype = (rows, inputs.shape[-1]), inputs.dtype
        return inputs @ inputs.new_empty(ctx.shape).mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].to(ctx.dtype)
        return gradient @ gradient.new_empty(ctx.shape), None, None


class PackedLinear(nn.Linear):
    """A linear layer of the sizes of another one, with a weight of half a byte or a byte a number.

    Args:
        layer: The other one. Its bias is not packed.
        bits: Of a number.
    """

    def __init__(self, layer: nn.Linear | Conv1D, bits: Bits) -> None:
        super().__init__(*linear_sizes(layer), bias=False, device="meta")
        numbers = self.in_features * self.out_features
        scales = -(-numbers // _BLOCK)

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device="meta")  # it is counted, and computes nothing

        packed = empty(-(-numbers // 2), torch.uint8) if bits == 4 else empty(numbers, torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        if bits == 4:
            self.register_buffer("scales", empty(scales, torch.uint8))
            self.register_buffer("scales_of_scales", empty(-(-scales // _SCALES), torch.float32))
        else:
            self.register_buffer("scales", empty(self.out_features, torch.float32))

    def forward(self, input: Tensor) -> Tensor:
        """Return the product in the type of the input; of 4 bits it is formed in bfloat16."""
        given = input.to(torch.bfloat16) if self.weight.dtype == torch.uint8 else input
        found: Tensor = _Product.apply(given, self.weight, self.out_features)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            found = found + self.bias.to(found.dtype)
        return found.to(input.dtype) if self.weight.dtype == torch.uint8 else found


@contextmanager
def with_packed_stand_ins(model: nn.Module) -> Iterator[None]:
    """Put stand-ins in place of a model's quantised layers in a `with` block."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and is_quantized(child):
                replaced.append((parent, name, child))
                setattr(parent, name, PackedLinear(child, 4 if hasattr(child.weight, "quant_state") else 8))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def pack(model: nn.Module, names: Iterable[str], bits: Bits) -> None:
    """Put stand-ins in place of a model's linear layers, for good.

    Args:
        model: On any device; of the layers, sizes alone are read.
        names: Qualified names of the layers.
        bits: Of a number.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        parent, _, local = name.rpartition(".")
        setattr(model.get_submodule(parent), local, PackedLinear(layer, bits))
