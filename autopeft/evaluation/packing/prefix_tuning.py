"""Prefix tuning of several candidates on one frozen model, each with its own length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from autopeft.evaluation.packing.layout import Layout, Undo, give_parameters
from autopeft.methods.prefix_tuning import Prefix, attend_behind

_IMPLEMENTATION = "autopeft_packed_prefix"
_ATTRIBUTE = "autopeft_packed_prefixes"


class PackedPrefixes:
    """The prefixes of one attention module.

    Args:
        layout: The slices of the pass.
        name: The module's name, for errors.
        parameters: Keys and values of each candidate that has a prefix there, (length, features) each.
    """

    def __init__(
        self, layout: Layout, name: str, parameters: Mapping[int, Mapping[str, nn.Parameter]]
    ) -> None:
        self.layout = layout
        self.name = name
        self.prefixes: dict[int, Prefix] = {}
        for at, own in parameters.items():
            length, features = own["key"].shape
            with torch.device("meta"):  # nothing is drawn: the values are there
                self.prefixes[at] = Prefix(length, features, 0.0)
            give_parameters(self.prefixes[at], own)

    def attend(
        self, module: nn.Module, states: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Return attention slice by slice, for query, key and value of all slices."""
        slices = zip(*(self.layout.sliced(one, self.name).unbind() for one in states), strict=True)
        rows = self.layout.rows
        outputs = []
        for at, (query, key, value) in enumerate(slices):
            own = mask if mask is None or mask.shape[0] == 1 else mask[at * rows : (at + 1) * rows]
            output, _ = attend_behind(self.prefixes.get(at), module, query, key, value, own, **kwargs)
            outputs.append(output)
        return torch.cat(outputs)


def packed_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA attention, with the candidates' prefixes where the module has any."""
    packed: PackedPrefixes | None = getattr(module, _ATTRIBUTE, None)
    if packed is None or not packed.layout.slices:
        return attend_behind(None, module, query, key, value, attention_mask, **kwargs)
    return packed.attend(module, (query, key, value), attention_mask, **kwargs), None


AttentionInterface.register(_IMPLEMENTATION, packed_prefix_attention)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


def give_prefixes(
    model: nn.Module, prefixes: Mapping[str, Mapping[int, Mapping[str, nn.Parameter]]], layout: Layout
) -> Undo:
    """Put prefixes on attention modules and route attention past them; return what takes them out.

    Args:
        model: A transformers model with an attention interface.
        prefixes: Attention module → candidate → its "key" and "value".
        layout: The slices of the pass.
    """
    assert isinstance(model, PreTrainedModel)
    before = model.config._attn_implementation
    hosts = {name: model.get_submodule(name) for name in prefixes}
    for name, host in hosts.items():
        setattr(host, _ATTRIBUTE, PackedPrefixes(layout, name, prefixes[name]))
    model.set_attn_implementation(_IMPLEMENTATION)

    def undo() -> None:
        for host in hosts.values():
            delattr(host, _ATTRIBUTE)
        model.set_attn_implementation(before)

    return undo
