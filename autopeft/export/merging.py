"""Merge adapters into the weights of a copy that shares everything else with the backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from autopeft.core.configuration import Configuration
from autopeft.export.loading import attach_tensors
from autopeft.methods import placements
from autopeft.methods.base import replace_module
from autopeft.methods.layer_adapter import merge_adapters
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import full_weight, state_tensors


def shared_copy(model: PreTrainedModel, own: Iterable[str] = ()) -> PreTrainedModel:
    """Return new modules that share every parameter and buffer with the model's, but for the `own` ones."""
    tensors = chain(model.parameters(), model.buffers(), state_tensors(model))
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name in own:
        replace_module(copied, name, copy.deepcopy(copied.get_submodule(name)))
    return copied


def merged_model(
    backbone: Backbone,
    configuration: Configuration,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the task's model with the adapters merged into its weights and the trained head.

    Only the modules that carry adapters, the head, and layers in 4 or 8 bits, which are unpacked, have
    tensors of their own, on the CPU: the rest is shared with the backbone, which stays as it is. Modules that
    carry adapters are of the `dtype`, by default the backbone's.

    The backbone has to carry nothing, and nothing in the configuration may be `unmergeable`. Tensors that do
    not belong to it, as `Attachment.state_dict` names them, raise a ValueError.
    """
    model = shared_copy(backbone.model)
    if backbone.quantized:
        _unpack(model, backbone.quantized)
    for site in configuration.adapters:
        module = model.get_submodule(backbone.shape(site).module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = parameter.detach().to("cpu", dtype, copy=True)  # the device need not hold the model twice
            setattr(module, name, nn.Parameter(own, requires_grad=False))
    attach_tensors(model, placements(configuration, backbone.sites), state)
    for name, layer in reversed(list(model.named_modules())):  # of layers around another, the inner one first
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            replace_module(model, name, model.get_submodule(f"{name}.base_layer"))
    merge_adapters(model)
    if hasattr(model, "peft_config"):
        del model.peft_config  # else save_pretrained would take the model for an adapter
    return model.requires_grad_(False)


def _unpack(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Put layers as the architecture has them in place of quantised ones, in the model's type."""
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name in names:
        packed, layer = model.get_submodule(name), plain.get_submodule(name)
        weight = full_weight(packed).to("cpu", model.dtype)
        if isinstance(layer, Conv1D):
            weight = weight.mT.contiguous()
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        if packed.bias is not None:
            bias = packed.get_parameter("bias").to("cpu", model.dtype)
            layer.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
        replace_module(model, name, layer)
