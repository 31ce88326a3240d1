"""The trainable peft LoRA layers of a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import nn


@dataclass(frozen=True)
class LoraModule:
    """One trainable LoRA adapter of one module: y = W·x + s·B·A·x.

    Attributes:
        name: Qualified name of the module.
        layer: The peft layer in its place.
        adapter: Name of the layer's active peft adapter.
    """

    name: str
    layer: LoraLayer
    adapter: str

    @property
    def down(self) -> nn.Linear:
        """A, whose weight has the shape (rank, inputs)."""
        return cast(nn.Linear, self.layer.lora_A[self.adapter])

    @property
    def up(self) -> nn.Linear:
        """B, whose weight has the shape (outputs, rank)."""
        return cast(nn.Linear, self.layer.lora_B[self.adapter])

    @property
    def rank(self) -> int:
        """The number of ranks the adapter was made with."""
        return int(self.layer.r[self.adapter])


def find_lora_modules(module: nn.Module) -> dict[str, LoraModule]:
    """Return the trainable LoRA layers inside a module by qualified name, in the module's order.

    Raises:
        ValueError: There is none, or there is one whose ranks cannot be switched one by one: several
            active adapters, merged weights, a bias, a variant such as DoRA, AdaLoRA, a convolution, an
            embedding, `nn.MultiheadAttention` or a bare parameter.
    """
    found: dict[str, LoraModule] = {}
    for name, layer, active in _trainable_layers(module):
        obstacle = _obstacle(layer, active)
        if obstacle is not None:
            raise ValueError(f"The ranks of {name} cannot be switched one by one: {obstacle}.")
        found[name] = LoraModule(name, layer, active[0])
    if not found:
        raise ValueError(
            f"{type(module).__name__} has no trainable LoRA layer: wrap the model with peft's LoraConfig "
            "before the training starts."
        )
    return found


def has_lora(module: nn.Module) -> bool:
    """Return whether there is a trainable LoRA layer inside a module."""
    return any(True for _ in _trainable_layers(module))


def _trainable_layers(module: nn.Module) -> Iterator[tuple[str, LoraLayer, list[str]]]:
    """Yield each layer in which something is trained, after its name, with its active adapters."""
    for name, layer in module.named_modules():
        parameters = layer.parameters()
        if isinstance(layer, LoraLayer) and any(parameter.requires_grad for parameter in parameters):
            held = {*layer.lora_A, *layer.lora_embedding_A}
            if active := [adapter for adapter in layer.active_adapters if adapter in held]:
                yield name, layer, active


def _obstacle(layer: LoraLayer, active: list[str]) -> str | None:
    adapter = active[0]
    if len(active) > 1:
        return f"several adapters are active ({', '.join(active)})"
    if isinstance(layer, AdaLoraLayer):
        return "AdaLoRA allocates its ranks itself (see AdaLoRA)"
    if isinstance(layer, MultiheadAttention | ParamWrapper) or not (
        adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)
    ):
        return f"its class {type(layer).__name__} is no linear layer"
    if layer.merged:
        return "its adapter is merged"
    if layer.lora_variant.get(adapter) is not None:
        return f"it is a LoRA variant, {type(layer.lora_variant[adapter]).__name__}"
    if layer.lora_bias.get(adapter, False):
        return "its adapter has a bias"
    return None
