"""Compacter: a series adapter whose matrices are sums of Kronecker products."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Placement, Trainable
from autopeft.methods.bottleneck import Bottleneck, Series
from autopeft.models.site_shapes import SiteShape

TERMS = 4
"""Kronecker products a matrix, as in the paper's settings."""


class KroneckerLinear(nn.Module):
    """A linear layer with the weight Σᵢ Aᵢ ⊗ (sᵢ·tᵢᵀ); all layers of a model share the Aᵢ."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(TERMS, in_features // TERMS) / in_features**0.5)
        self.outer = nn.Parameter(torch.randn(TERMS, out_features // TERMS))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.rules: nn.Parameter  # (TERMS, TERMS, TERMS), put there once it stands on the device

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        rules = self.rules.to(self.outer.device)  # a model's blocks may lie on several
        weight = torch.einsum("tij,to,tn->iojn", rules, self.outer, self.inner)
        return functional.linear(hidden, weight.reshape(len(self.bias), -1), self.bias)


class Compacter(Series):
    """Compacter: series adapters, `size` fours wide, with "slow" weights that all of a model share.

    Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021.
    """

    name = "compacter"
    shares_state = True

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it: a width that is no multiple of the number of terms."""
        width = shape.out_features
        return f"its width of {width} is no multiple of {TERMS}" if width % TERMS else None

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return d + b for each of both projections, and their b + d biases."""
        return 3 * (shape.out_features + TERMS * adapter.size_or_zero)

    def count_shared(self, placement: Placement) -> int:
        """Return the numbers of the shared matrices."""
        return TERMS**3

    def bottleneck(self, shape: SiteShape, adapter: Adapter) -> Bottleneck:
        """Return a bottleneck without the shared matrices."""
        features, width = shape.out_features, TERMS * adapter.size_or_zero
        down, up = KroneckerLinear(features, width), KroneckerLinear(width, features)
        nn.init.zeros_(up.outer)
        return Bottleneck(down, up, str(adapter.option("activation")))

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Hook the adapters in, and give them their shared matrices; see `Method.attach`."""
        trainable = super().attach(model, placement, undo)
        hosts = (
            model.get_submodule(f"{shape.module}.autopeft_{self.name}") for shape, _ in placement.values()
        )
        layers = [layer for host in hosts for layer in host.children() if isinstance(layer, KroneckerLinear)]
        drawn = torch.randn(TERMS, TERMS, TERMS) / TERMS**0.5
        rules = nn.Parameter(drawn.to(layers[0].bias.device))
        for layer in layers:
            layer.rules = rules
        return {**trainable, self.name: {"rules": rules}}
