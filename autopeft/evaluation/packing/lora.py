"""LoRA of several trials at one site, each on the trial's own rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autopeft.core.configuration import Adapter


class PackingError(ValueError):
    """The model computes in a way that packed trials cannot follow."""


@dataclass
class RowGroups:
    """The rows of the current pass: group i, a whole batch, belongs to member i."""

    count: int = 0  # 0 in the pass through frozen blocks that members share
    rows: int = 0  # of a batch
    tokens: int = 0  # of a row

    def split(self, tensor: Tensor) -> Tensor:
        """View (groups × rows, ...) as (groups, rows, ...); rows and tokens may be one dimension.

        Raises:
            PackingError: The first dimension has another size.
        """
        expected = self.count * self.rows
        if self.count > 1 and len(tensor) not in (expected, expected * self.tokens):
            raise PackingError(f"a module is given {len(tensor)} rows where the pack has {expected}")
        groups: Tensor = tensor.unflatten(0, (self.count, -1))
        return groups


LoraWeights = tuple[Adapter, nn.Parameter, nn.Parameter]
"""A LoRA with its matrices A and B."""


class PackedLora:
    """LoRA of several members at one site: two batched products, with ranks padded to the largest.

    The members' parameters become views of the padded matrices, and their gradients views of the padded
    gradients, so that a step needs no copies. Padding starts at 0 and has a gradient of 0.

    Args:
        groups: The rows of the pass.
        members: The adapters, by the index of the member.
    """

    def __init__(self, groups: RowGroups, members: Mapping[int, LoraWeights]) -> None:
        self._groups = groups
        _, first, last = next(iter(members.values()))
        padded = len(members), max(len(down) for _, down, _ in members.values())
        self._down = first.new_zeros(*padded, first.shape[1]).requires_grad_()
        self._up = first.new_zeros(*padded, len(last)).requires_grad_()
        self._down.grad, self._up.grad = torch.zeros_like(self._down), torch.zeros_like(self._up)
        for place, (_, down, up) in enumerate(members.values()):
            at = place, slice(len(down))
            _become_view(down, self._down.detach()[at], self._down.grad[at])
            _become_view(up, self._up.detach()[at].T, self._up.grad[at].T)
        scales = [
            float(adapter.option("alpha")) / (len(down) ** (0.5 if adapter.option("rslora") else 1))
            for adapter, down, _ in members.values()
        ]
        self._scaling = first.new_tensor(scales).view(-1, 1, 1)
        self._dropout = [float(adapter.option("dropout")) for adapter, _, _ in members.values()]
        self._indices = torch.tensor(list(members), device=first.device)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Add each member's update to its rows; a forward hook of the site's module."""
        if not self._groups.count:
            return None
        hidden = self._groups.split(inputs[0]).flatten(1, -2)
        base = self._groups.split(output).flatten(1, -2)
        all_have_it = len(self._indices) == self._groups.count
        if not all_have_it:
            hidden = hidden.index_select(0, self._indices)
        if module.training and any(self._dropout):
            rows = zip(hidden.unbind(), self._dropout, strict=True)
            hidden = torch.stack([functional.dropout(own, rate) for own, rate in rows])
        inner = torch.bmm(hidden, self._down.transpose(1, 2))
        inner = inner * self._scaling.to(inner.dtype)
        if all_have_it:
            return torch.baddbmm(base, inner, self._up).view(output.shape)
        update = torch.bmm(inner, self._up).to(base.dtype)
        return base.index_add(0, self._indices, update).view(output.shape)


def _become_view(parameter: nn.Parameter, values: Tensor, gradient: Tensor) -> None:
    values.copy_(parameter.detach())
    parameter.data = values
    parameter.grad = gradient
