"""Several trials on one resident backbone, as one model.

A member's cut is its lowest block with an adapter. The batch runs once, without gradients, through the blocks
below the highest cut. A member's rows start as a copy of the hidden states at its cut, and run from there on
together with those of the members with lower cuts. Masks and positions are the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from autopeft.evaluation.frozen_blocks.block_skipping import (
    Structure,
    evaluation_mode_below,
    states_at,
)
from autopeft.evaluation.packing.lora import LoraWeights, PackedLora, RowGroups
from autopeft.evaluation.packing.member import MemberRun
from autopeft.models.backbone import Backbone
from autopeft.tasks.base import Batch
from autopeft.tasks.batch import model_inputs


class PackedModel:
    """The members of a pack on a backbone, until `remove`; the backbone's weights stay untouched.

    Args:
        backbone: The resident backbone, carrying nothing.
        members: The trials, in the order of their cuts.
        structure: What the backbone's blocks return; None to share no blocks.
    """

    def __init__(self, backbone: Backbone, members: Sequence[MemberRun], structure: Structure | None) -> None:
        self._backbone = backbone
        self._members = members
        self._task = members[0].evaluator.task
        self._structure = structure
        self._cuts = [0 if structure is None else member.cut for member in members]
        self._groups = RowGroups()
        self._heads: list[nn.Module] = []
        self._undo: list[Callable[[], None]] = []
        backbone.attached = members[0].configuration
        try:
            self._attach_loras()
            for name in backbone.head:
                self._replace_head(name)
            self.train(True)
        except BaseException:
            self.remove()
            raise

    def _attach_loras(self) -> None:
        for site, shape in self._backbone.sites.items():
            loras: dict[int, LoraWeights] = {}
            for index, member in enumerate(self._members):
                for adapter in member.configuration.adapters.get(site, ()):
                    name, parameters = f"{site}.{adapter.method}", member.parameters
                    down, up = (parameters[f"{name}.{matrix}.weight"] for matrix in ("lora_A", "lora_B"))
                    loras[index] = adapter, down, up
            if loras:
                module = self._backbone.model.get_submodule(shape.module)
                hook = module.register_forward_hook(PackedLora(self._groups, loras))
                self._undo.append(hook.remove)

    def _replace_head(self, name: str) -> None:
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
        self._undo.append(lambda: delattr(head, "forward"))

    def train(self, mode: bool) -> None:
        """Switch dropout."""
        for module in (self._backbone.model, *self._heads):
            module.train(mode)

    def remove(self) -> None:
        """Take everything out of the backbone."""
        while self._undo:
            self._undo.pop()()
        self._backbone.attached = None

    def __call__(self, batch: Mapping[str, Tensor]) -> list[Any]:
        """Return the model's output for each member, the prediction alone, for one batch that all are given.

        Raises:
            PackingError: The model computes in a way that packed trials cannot follow.
        """
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

        The states are those of the members with lower cuts, if any, and those that the others share.
        """
        self._groups.count = sum(own <= cut for own in self._cuts)
        with ExitStack() as stack:
            if cut and self._structure is not None:
                states = torch.cat([*active, *[shared[cut]] * self._cuts.count(cut)])
                stack.enter_context(evaluation_mode_below(cut, self._backbone))
                stack.enter_context(self._structure.serving(cut, states))
            yield {name: torch.cat([tensor] * self._groups.count) for name, tensor in inputs.items()}
