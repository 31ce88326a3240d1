"""What own methods on single layers share: a module that changes what a layer returns, and merges into it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Switchable, Trainable, hang
from autopeft.models.quantized_layers import full_weight
from autopeft.models.site_shapes import SiteShape


class LayerAdapter(Switchable):
    """A module that is called as a layer's forward hook, and whose change the layer's weights can take in."""

    handle: RemovableHandle  # of the hook

    def forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return what the layer is to return: (..., out_features), in the output's type."""
        raise NotImplementedError

    def merge(self, layer: nn.Module) -> None:
        """Put the change into the layer's own weights."""
        raise NotImplementedError


class WeightUpdate(LayerAdapter):
    """An update of a linear layer's weight, computed beside the layer."""

    def update(self, inputs: Tensor) -> Tensor:
        """Map inputs (..., in_features) to what is added to the output (..., out_features)."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Return the update as a matrix (out_features, in_features)."""
        raise NotImplementedError

    def forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add the update to the output."""
        if not self.is_on:
            return output
        (given,) = inputs
        return output + self.update(in_type_of(self, given)).to(output.dtype)

    def merge(self, layer: nn.Module) -> None:
        """Add the update to the layer's weight."""
        weight, update = layer.get_parameter("weight"), self.weight()
        weight.data = (weight + (update.mT if isinstance(layer, Conv1D) else update)).to(weight.dtype)


def in_type_of(adapter: nn.Module, hidden: Tensor) -> Tensor:
    """Return inputs in an adapter's type (float32 on any base, as peft's), unless autocast sees to it."""
    dtype = next(adapter.parameters()).dtype
    if hidden.dtype == dtype or torch.is_autocast_enabled(hidden.device.type):
        return hidden
    return hidden.to(dtype)


class LayerMethod(Method):
    """A method whose adapters are `LayerAdapter` modules, one a layer, held by hooks."""

    is_mergeable = True

    @abstractmethod
    def module(self, layer: nn.Module, shape: SiteShape, adapter: Adapter) -> LayerAdapter:
        """Return a module for a layer, on the CPU. Its buffers are saved with the adapter."""

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Hook the modules in; see `Method.attach`."""
        tensors: Trainable = {}
        for site, (shape, adapter) in placement.items():
            layer = model.get_submodule(shape.module)
            module = self.module(layer, shape, adapter)
            hang(layer, f"autopeft_{self.name}", module, undo)
            module.handle = layer.register_forward_hook(module)
            undo.callback(module.handle.remove)
            tensors[site] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return tensors


def weight_of(layer: nn.Module, shape: SiteShape) -> Tensor:
    """Return a linear layer's weight as (out_features, in_features), on the CPU: there it decides alike.

    Of a model without weights, on the meta device, there is the shape alone.
    """
    if layer.get_parameter("weight").is_meta:
        return torch.empty(shape.out_features, shape.in_features, device="meta")
    weight = full_weight(layer).cpu()
    return weight.mT if shape.transposed else weight


def beyond_full_rank(shape: SiteShape, adapter: Adapter) -> str | None:
    """Say what is against a rank that a weight does not have, or return None."""
    most = min(shape.in_features, shape.out_features)
    return f"its weight has {most:,} singular values" if adapter.size_or_zero > most else None


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Merge adapters into the weights: `LayerAdapter` modules, and parametrizations that are `Switchable`."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LayerAdapter) and hasattr(module, "handle"):  # not a part of another
            name, _, child = path.rpartition(".")
            layer = model.get_submodule(name)
            module.merge(layer)
            module.handle.remove()
            delattr(layer, child)
        if parametrize.is_parametrized(module):
            by_name = cast(Mapping[str, nn.ModuleList], module.parametrizations)
            for child in [name for name, several in by_name.items() if isinstance(several[0], Switchable)]:
                value = cast(Tensor, getattr(module, child))
                parametrize.remove_parametrizations(module, child, leave_parametrized=False)
                parameter = module.get_parameter(child)
                parameter.data = value.to(parameter.dtype)
