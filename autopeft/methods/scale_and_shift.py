"""SSF: what a layer returns is scaled and shifted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autopeft.core.configuration import Adapter
from autopeft.methods.layer_adapter import LayerAdapter, LayerMethod
from autopeft.models.site_shapes import SiteShape


class ScaleAndShift(LayerAdapter):
    """A factor, and where `has_shift` a summand, for every feature of an output."""

    def __init__(self, features: int, has_shift: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.shift = nn.Parameter(torch.zeros(features)) if has_shift else None

    def forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Scale and shift the output."""
        if not self.is_on:
            return output
        scaled = output * self.scale  # in single precision: in half of it, a small step would round to none
        return (scaled if self.shift is None else scaled + self.shift).to(output.dtype)

    def merge(self, layer: nn.Module) -> None:
        """Scale the layer's weight and bias, and shift the bias."""
        weight = layer.get_parameter("weight")
        scale = self.scale if isinstance(layer, Conv1D) else self.scale[:, None]
        weight.data = (weight * scale).to(weight.dtype)
        if self.shift is not None:
            bias = layer.get_parameter("bias")
            bias.data = (bias * self.scale + self.shift).to(bias.dtype)


class SSF(LayerMethod):
    """SSF: the output of a linear layer is scaled and shifted.

    Lian et al., "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", 2022. A layer
    without a bias, which could not take the shift in when merged, is scaled alone. On a norm it would be
    LayerNorm tuning.
    """

    name = "ssf"

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the width of the output, once for the scale and once for the shift."""
        return shape.out_features + shape.bias

    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> ScaleAndShift:
        """Return a scale of 1 and a shift of 0."""
        return ScaleAndShift(shape.out_features, has_shift=bool(shape.bias))
