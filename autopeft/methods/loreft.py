"""LoReFT: the hidden state that leaves a block is changed within a small subspace."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from autopeft.core.configuration import Adapter, Site
from autopeft.methods.base import Method, Placement, Switchable, Trainable, hang
from autopeft.methods.layer_adapter import in_type_of
from autopeft.models.site_shapes import SiteShape

_MASKS = ("attention_mask", "decoder_attention_mask")
_PLACES = "position_ids"  # with which packed rows begin anew
_WITHOUT_MASK = ("vision", "audio")  # stacks whose tokens are not those of the model's mask


class Intervention(Switchable):
    """h + Rᵀ(W·h + b − R·h), where R has orthonormal rows: of a block's output, on its first real tokens.

    W starts at R and b at 0, so that the model starts at what it computed before; the paper draws W.
    """

    def __init__(
        self, features: int, rank: int, positions: int, arguments: Mapping[str, Any], mask: str
    ) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(rank, features))
        self.source = nn.Linear(features, rank)
        with torch.no_grad():
            self.source.weight.copy_(self.rows())
            self.source.bias.zero_()
        self.positions = positions
        self.arguments, self.mask = arguments, mask

    def rows(self) -> Tensor:
        """Return R: the basis made orthonormal, (rank, features)."""
        columns, triangle = torch.linalg.qr(self.basis.mT)
        # Without the signs it would jump as the basis moves.
        rows: Tensor = (columns * triangle.diagonal().sign()).mT
        return rows

    def forward(self, _block: nn.Module, _inputs: Any, output: Any) -> Any:
        """Change the hidden state, (batch, tokens, features), that a block returns alone or before others."""
        if not self.is_on:
            return output
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        given = in_type_of(self, hidden)
        rows = self.rows()
        # Of two products the difference, small beside either, would be lost in bfloat16.
        inner = functional.linear(given, self.source.weight - rows, self.source.bias)
        change = functional.linear(inner, rows.mT).to(hidden.dtype)
        changed = hidden + (change * self._chosen(hidden) if self.positions else change)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def _chosen(self, hidden: Tensor) -> Tensor:
        """Return 1 for the tokens that are changed and 0 for others, (batch or 1, tokens, 1)."""
        tokens = hidden.shape[1]
        mask, places = self.arguments.get(self.mask), self.arguments.get(_PLACES)
        if mask is None or mask.ndim != 2 or mask.shape[1] < tokens:
            mask = torch.ones(1, tokens, device=hidden.device)
        # As text is generated, the mask has the tokens before as well.
        chosen = ((mask > 0) & (mask.cumsum(1) <= self.positions))[:, -tokens:]
        if self.mask == _MASKS[0] and places is not None and places.ndim == 2:
            chosen = (mask[:, -tokens:] > 0) & (places < self.positions)
        return chosen[..., None].to(hidden.dtype)


class LoReFT(Method):
    """LoReFT on the output of single blocks.

    Wu et al., "ReFT: Representation Finetuning for Language Models", 2024. The option `positions` says how
    many tokens are changed: the first ones that are no padding, or all with 0. They are counted by the
    model's mask; where it is given none, padding counts. Where it is given `position_ids`, those say which
    are first: of packed rows, those of each. The paper's last tokens of a prompt have no counterpart here: in
    training a text goes on behind its prompt.
    """

    name = "loreft"

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Return what is against it."""
        if not shape.block_module:
            return "its block has no attention, and may not return a vector a token"
        width = shape.out_features
        return f"its hidden state has {width:,} features" if adapter.size_or_zero > width else None

    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return r·d for R, and r·d + r for W and b."""
        return 2 * adapter.size_or_zero * shape.out_features + adapter.size_or_zero

    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Hook interventions to blocks, and to the model what remembers its masks; see `Method.attach`."""
        assert isinstance(model, PreTrainedModel)
        arguments: dict[str, Any] = {}

        def remember(module: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
            # Until the next pass: a block whose activations are computed again is called once more.
            names = (*_MASKS, _PLACES) if module is model else _MASKS[:1]
            arguments.update({name: named.get(name) for name in names})

        if any(adapter.option("positions") for _, adapter in placement.values()):
            # An encoder is called by itself before text is generated.
            for module in (model, *([model.get_encoder()] if model.config.is_encoder_decoder else [])):
                undo.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
        parameters: Trainable = {}
        for site, (shape, adapter) in placement.items():
            block = model.get_submodule(shape.block_module)
            positions = int(adapter.option("positions"))
            intervention = Intervention(
                shape.out_features, adapter.size_or_zero, positions, arguments, _mask_of(model, site)
            )
            hang(block, "autopeft_loreft", intervention, undo)
            undo.callback(block.register_forward_hook(intervention).remove)
            parameters[site] = dict(intervention.named_parameters())
        return parameters


def _mask_of(model: PreTrainedModel, site: Site) -> str:
    """Return the argument of a model that says which tokens of a stack are no padding; empty without one."""
    if model.main_input_name != "input_ids" or site.stack in _WITHOUT_MASK:
        return ""
    return _MASKS[model.config.is_encoder_decoder and site.stack == "decoder"]
