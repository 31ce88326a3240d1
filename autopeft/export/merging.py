"""Merge adapters into the weights of a copy that shares everything else with the backbone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from autopeft.core.configuration import Configuration
from autopeft.export.loading import attach_tensors
from autopeft.methods import placements
from autopeft.methods.base import replace_module
from autopeft.models.backbone import Backbone


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return new modules that share every parameter and buffer with the model's."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def merged_model(
    backbone: Backbone, configuration: Configuration, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    """Return the task's model with the adapters merged into its weights and the trained head.

    Only the modules that carry adapters, and the head, have tensors of their own, on the CPU: the rest is
    shared with the backbone, which stays as it is.

    The backbone has to carry nothing, and nothing in the configuration may be `unmergeable`. Tensors that do
    not belong to it, as `Attachment.state_dict` names them, raise a ValueError.
    """
    model = shared_copy(backbone.model)
    for site in configuration.adapters:
        module = model.get_submodule(backbone.shape(site).module)
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = parameter.detach().to("cpu", copy=True)  # the device need not hold the model twice
            setattr(module, name, nn.Parameter(own, requires_grad=False))
    attach_tensors(model, placements(configuration, backbone.sites), state)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            replace_module(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config  # else save_pretrained would take the model for an adapter
    return model.requires_grad_(False)
