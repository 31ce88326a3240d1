"""Several trials on one resident backbone, as one model.

A member's cut is its lowest block with an adapter. The batch runs once, without gradients, through the blocks
below the highest cut. A member's rows start as a copy of the hidden states at its cut, and run from there on
together with those of the members with lower cuts. Masks and positions are the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from autopeft.core.configuration import Site
from autopeft.evaluation.frozen_blocks.block_skipping import Structure, evaluation_mode_below, states_at
from autopeft.evaluation.packing.member import MemberRun, PackingError
from autopeft.methods.lora import lora_scaling
from autopeft.models.backbone import Backbone
from autopeft.tasks.base import Batch
from autopeft.tasks.batch import model_inputs


@dataclass
class RowGroups:
    """The rows of the current pass: group i, a whole batch, belongs to member i."""

    count: int = 0  # 0 in the pass through frozen blocks that members share
    rows: int = 0  # of a batch
    tokens: int = 0  # of a row

    def split(self, tensor: Tensor) -> Tensor:
        """View (groups × rows, ...) as (groups, rows, ...); rows and tokens may be one dimension."""
        expected = self.count * self.rows
        if self.count > 1 and len(tensor) not in (expected, expected * self.tokens):
            raise PackingError(f"a module is given {len(tensor)} rows where the pack has {expected}")
        groups: Tensor = tensor.unflatten(0, (self.count, -1))
        return groups


class PackedLora:
    """LoRA of several members at one site, as two batched products with ranks padded to the largest.

    The members' parameters become views of the padded matrices, and their gradients views of the padded
    gradients, so that a step needs no copies. Padding starts at 0 and has a gradient of 0. The members are
    those with a LoRA at the site, by their index in the pack.
    """

    def __init__(self, groups: RowGroups, site: Site, members: Mapping[int, MemberRun]) -> None:
        self._groups = groups
        downs, ups = (
            [member.parameters[f"{site}.lora.{matrix}.weight"] for member in members.values()]
            for matrix in ("lora_A", "lora_B")
        )
        padded = len(members), max(map(len, downs))
        self._down = downs[0].new_zeros(*padded, downs[0].shape[1]).requires_grad_()
        self._up = downs[0].new_zeros(*padded, len(ups[0])).requires_grad_()
        self._down.grad, self._up.grad = torch.zeros_like(self._down), torch.zeros_like(self._up)
        for place, (down, up) in enumerate(zip(downs, ups, strict=True)):
            at = place, slice(len(down))
            _become_view(down, self._down.detach()[at], self._down.grad[at])
            _become_view(up, self._up.detach()[at].T, self._up.grad[at].T)
        adapters = [member.configuration.adapters[site][0] for member in members.values()]
        self._scaling = downs[0].new_tensor([lora_scaling(adapter) for adapter in adapters]).view(-1, 1, 1)
        self._dropout = [float(adapter.option("dropout")) for adapter in adapters]
        self._indices = torch.tensor(list(members), device=downs[0].device)

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


class PackedModel:
    """The members of a pack, in the order of their cuts, on a backbone that carries nothing, until `remove`.

    The backbone's weights stay untouched. Without a structure no blocks are shared.
    """

    def __init__(self, backbone: Backbone, members: Sequence[MemberRun], structure: Structure | None) -> None:
        self._backbone = backbone
        self._members = members
        self._task = members[0].evaluator.task
        self._structure = structure
        self._cuts = [0 if structure is None else member.cut for member in members]
        self._groups = RowGroups()
        self._heads: list[nn.Module] = []
        with ExitStack() as undo:
            undo.callback(setattr, backbone, "attached", None)
            backbone.attached = members[0].configuration
            for site, shape in backbone.sites.items():
                having = {
                    index: member
                    for index, member in enumerate(members)
                    if site in member.configuration.adapters
                }
                if having:
                    module = backbone.model.get_submodule(shape.module)
                    undo.callback(module.register_forward_hook(PackedLora(self._groups, site, having)).remove)
            for name in backbone.head:
                self._replace_head(name, undo)
            self.train(True)
            self._undo = undo.pop_all()

    def _replace_head(self, name: str, undo: ExitStack) -> None:
        """Let the rows of each member go through a copy of a head with its own parameters."""
        head, groups, start = self._backbone.model.get_submodule(name), self._groups, f"head.{name}."
        frozen, copied = head.forward, copy.deepcopy(head)
        weights: list[dict[str, Tensor]] = [
            {key[len(start) :]: own for key, own in member.parameters.items() if key.startswith(start)}
            for member in self._members
        ]

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not groups.count:
                return frozen(hidden, *args, **kwargs)
            rows = zip(weights, groups.split(hidden).unbind(), strict=True)
            return torch.cat([functional_call(copied, own, (each, *args), kwargs) for own, each in rows])

        head.forward = forward
        self._heads.append(copied)
        undo.callback(delattr, head, "forward")

    def train(self, mode: bool) -> None:
        """Switch dropout."""
        for module in (self._backbone.model, *self._heads):
            module.train(mode)

    def remove(self) -> None:
        """Take everything out of the backbone."""
        self._undo.close()

    def __call__(self, batch: Mapping[str, Tensor]) -> list[Any]:
        """Return each member's output for one batch that all are given, with the prediction alone."""
        inputs = model_inputs(batch)
        self._groups.rows, self._groups.tokens = next(iter(inputs.values())).shape[:2]
        try:
            predicted = self._task.predicted(self._output(inputs))
            each = predicted.unflatten(0, (len(self._members), -1)).unbind()
            return [SimpleNamespace(**{self._task.prediction: own}) for own in each]
        finally:
            self._groups.count = 0

    def _output(self, inputs: Batch) -> Any:
        backbone, cuts = self._backbone, sorted(set(self._cuts))
        shared: dict[int, Tensor] = {}
        if cuts[-1]:
            with torch.no_grad(), evaluation_mode_below(cuts[-1], backbone):
                shared = states_at([cut for cut in cuts if cut], backbone, self._task, inputs)
        active: list[Tensor] = []
        for cut, following in pairwise(cuts):
            with self._from(cut, inputs, shared, active) as repeated:
                active = [states_at([following], backbone, self._task, repeated)[following]]
        with self._from(cuts[-1], inputs, shared, active) as repeated:
            return self._task.forward(backbone.model, repeated)

    @contextmanager
    def _from(
        self, cut: int, inputs: Batch, shared: Mapping[int, Tensor], active: Sequence[Tensor]
    ) -> Iterator[Batch]:
        """Give the inputs of the members up to a cut, with hidden states in place of the blocks below it.

        These are the active ones, of the members with lower cuts, and those that the others share.
        """
        self._groups.count = sum(own <= cut for own in self._cuts)
        with ExitStack() as stack:
            if cut and self._structure is not None:
                states = torch.cat([*active, *[shared[cut]] * self._cuts.count(cut)])
                stack.enter_context(evaluation_mode_below(cut, self._backbone))
                stack.enter_context(self._structure.serving(cut, states))
            yield {name: torch.cat([tensor] * self._groups.count) for name, tensor in inputs.items()}
