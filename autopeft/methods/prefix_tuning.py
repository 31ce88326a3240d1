"""Prefix tuning: learned keys and values that every token of a block can attend to.

peft's prefix tuning is one global length through `past_key_values`; this one sits on single blocks. It
goes through transformers' attention interface, the documented place to change how attention is computed.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from autopeft.core.configuration import Adapter
from autopeft.methods.base import Method, Placement, Switchable, Trainable, hang
from autopeft.models.site_shapes import SiteShape

_IMPLEMENTATION = "autopeft_prefix"
_CHILD = "autopeft_prefix"


class Prefix(Switchable):
    """Learned keys and values in front of a block's own, as wide as one token's over all key heads."""

    def __init__(self, length: int, features: int, initial_std: float) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.randn(length, features) * initial_std)
        self.value = nn.Parameter(torch.randn(length, features) * initial_std)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix in front of keys and values of shape (batch, heads, tokens, head width)."""
        batch, heads, _, width = key.shape

        def heads_first(prefix: Tensor) -> Tensor:
            split = prefix.view(-1, heads, width).transpose(0, 1)
            return split.unsqueeze(0).expand(batch, -1, -1, -1)

        return (
            torch.cat([heads_first(self.key).to(key.dtype), key], dim=2),
            torch.cat([heads_first(self.value).to(value.dtype), value], dim=2),
        )


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA attention, with the module's prefix in front of keys and values if it has one."""
    prefix: Prefix | None = getattr(module, _CHILD, None)
    if prefix is not None and prefix.is_on:
        tokens = query.shape[2]
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and causal and tokens > 1:
            # SDPA's own causal mask would be aligned to the first key, which is now a prefix position.
            seen = key.shape[2]
            attention_mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(
                seen - tokens
            )[None, None]
            is_causal = False
        if attention_mask is not None:
            visible = True if attention_mask.dtype == torch.bool else 0.0
            length = prefix.key.shape[0]
            attention_mask = nn.functional.pad(attention_mask, (length, 0), value=visible)
        key, value = prefix(key, value)
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
    )
    return output, None


AttentionInterface.register(_IMPLEMENTATION, prefix_attention)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


class PrefixTuning(Method):
    """Prefix tuning on single blocks, without reparameterisation.

    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021. Prefix keys carry
    no position: with rotary embeddings they are not rotated, as with `past_key_values`.
    """

    name = "prefix"
    starts_at_base = False  # every token attends to the prefix

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return a key and a value a prefix position."""
        return 2 * adapter.size_or_zero * shape.key_value_features

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Put prefixes on attention modules and route attention past them; see `Method.attach`."""
        assert isinstance(model, PreTrainedModel)
        parameters: Trainable = {}
        stacks = {_stack_of(model, shape.attention_module): None for shape, _ in placement.values()}
        for stack in stacks:
            undo.callback(stack.set_attn_implementation, _implementations(stack))
        for stack in stacks:
            stack.set_attn_implementation(_IMPLEMENTATION)
        for site, (shape, adapter) in placement.items():
            prefix = Prefix(
                adapter.size_or_zero, shape.key_value_features, float(adapter.option("initial_std"))
            )
            hang(model.get_submodule(shape.attention_module), _CHILD, prefix, undo)
            parameters[site] = dict(prefix.named_parameters())
        return parameters


def _stack_of(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Return the innermost model that an attention module is in, as the text model of one with images."""
    names = accumulate(attention.split("."), lambda parent, name: f"{parent}.{name}")
    around = (model.get_submodule(name) for name in names)
    return [model, *(module for module in around if isinstance(module, PreTrainedModel))][-1]


def _implementations(model: PreTrainedModel) -> dict[str, str | None]:
    """Return what `set_attn_implementation` takes to bring back a model and the models in it."""
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    # transformers has a setter of it, and no other way to read what is set.
    return {name: part._attn_implementation for name, part in {"": config, **parts}.items() if part}
