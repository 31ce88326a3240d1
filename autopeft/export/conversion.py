"""One plain LoRA for a whole configuration: what changes the weights of linear layers, decomposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.merging import merged_model
from autopeft.export.serving import plain_adapter
from autopeft.methods import METHODS
from autopeft.methods.data_initialised import LoraFromData
from autopeft.methods.lora import lora_scaling, lora_tensors
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import full_weight, is_quantized

ENERGY = 0.99
"""Share of the squared singular values of an update that a LoRA in its place keeps at least."""


def as_exported(configuration: Configuration) -> Configuration:
    """Return a configuration with LoRA in the place of methods that differ from it in how they start."""
    adapters = {
        site: [
            method.as_lora(adapter)
            if isinstance(method := METHODS[adapter.method], LoraFromData)
            else adapter
            for adapter in several
        ]
        for site, several in configuration.adapters.items()
    }
    return configuration.replace(adapters=adapters)


def exported_state(configuration: Configuration, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `as_exported`, which computes the same, from the configuration's own."""
    exported = dict(state)
    for site, adapter in configuration:
        if isinstance(method := METHODS[adapter.method], LoraFromData):
            prefix = f"{site}.{adapter.method}."
            own = {name: exported.pop(name) for name in state if name.startswith(prefix)}
            factors = method.lora_factors({name.removeprefix(prefix): own[name] for name in own})
            exported |= dict(zip(lora_tensors(site), factors, strict=True))
    return exported


@dataclass(frozen=True, kw_only=True)
class PlainLora:
    """A trained configuration as one LoRA with a scale of 1 for every module."""

    configuration: Configuration
    state: Mapping[str, Tensor]  # as `Attachment.state_dict` names it
    energy_kept: Mapping[Site, float]  # of each site that carried anything but LoRA alone


def plain_lora(
    backbone: Backbone, configuration: Configuration, state: Mapping[str, Tensor], energy: float = ENERGY
) -> PlainLora:
    """Put a LoRA in the place of every adapter.

    LoRA stays as it is, its scale folded into B. Whatever else changes the weight of a linear layer is merged
    in float32, and the difference cut to the smallest rank that keeps a share of its squared singular values.

    peft's `convert_to_lora` does so for fifteen of its families, one at a time. This takes whatever can be
    merged, several methods side by side, and says what each site keeps.

    Args:
        backbone: The backbone it was trained on, carrying nothing; left as it is.
        configuration: What was trained; all of it can be merged.
        state: The trained tensors, as `Attachment.state_dict` gives them.
        energy: The share of the squared singular values to keep, above 0 and up to 1.

    Raises:
        ValueError: The share is none, or an adapter changes more than the weight of a linear layer.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is the share of each update to keep, above 0 and up to 1, got {energy!r}.")
    others = {site: several for site, several in configuration.adapters.items() if _names(several) != "lora"}
    for site, several in others.items():
        if site.kind != "linear":
            raise _no_lora(site, several, f"it changes a {site.kind}")
    merged = merged_model(backbone, configuration, state, torch.float32) if others else None
    tensors = {name: tensor for name, tensor in state.items() if name.startswith("head.")}
    adapters: dict[Site, Adapter] = {}
    kept: dict[Site, float] = {}
    for site, several in configuration.adapters.items():
        down, up = lora_tensors(site)
        if merged is not None and site in others:
            update = _update(backbone, merged, site, several)
            tensors[down], tensors[up], kept[site] = _decomposed(update, energy)
            adapters[site] = plain_adapter(len(tensors[down]))
        else:
            (lora,) = several
            tensors |= {down: state[down], up: state[up] * lora_scaling(lora)}
            adapters[site] = plain_adapter(lora.size_or_zero)
    return PlainLora(
        configuration=configuration.replace(adapters=adapters, allocation=None),
        state=tensors,
        energy_kept=kept,
    )


def _update(backbone: Backbone, merged: PreTrainedModel, site: Site, several: Sequence[Adapter]) -> Tensor:
    """Return what adapters added to the weight of a linear layer, (out, in), on the backbone's device."""
    layer, changed = (model.get_submodule(backbone.shape(site).module) for model in (backbone.model, merged))
    for name, parameter in changed.named_parameters():
        if name != "weight" and not torch.equal(parameter, layer.get_parameter(name).to(parameter)):
            raise _no_lora(site, several, f"it changes the {name}")
    weight = full_weight(layer)
    if is_quantized(layer):
        weight = weight.to(backbone.model.dtype)  # to which merging unpacks it
    update = full_weight(changed) - weight.to("cpu", torch.float32)
    return (update.mT if isinstance(changed, Conv1D) else update).to(backbone.model.device)


def _decomposed(update: Tensor, energy: float) -> tuple[Tensor, Tensor, float]:
    """Return A and B of the smallest rank that keeps a share of an update's energy, and what they keep."""
    left, sigma, right = torch.linalg.svd(update, full_matrices=False)
    shares = sigma.double().square().cumsum(0)
    shares = shares / shares[-1] if shares[-1] > 0 else torch.ones_like(shares)
    rank = min(int((shares < energy).sum()) + 1, len(sigma))
    root = sigma[:rank].sqrt()
    down, up = root[:, None] * right[:rank], left[:, :rank] * root
    return down.cpu().contiguous(), up.cpu().contiguous(), float(shares[rank - 1])


def _names(several: Sequence[Adapter]) -> str:
    return ", ".join(adapter.method for adapter in several)


def _no_lora(site: Site, several: Sequence[Adapter], why: str) -> ValueError:
    return ValueError(
        f"No LoRA can stand for {_names(several)} at {site}: {why}, and LoRA holds weights of linear layers "
        "alone. Export with target='merged'."
    )
