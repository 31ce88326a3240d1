"""One forward pass for several candidates: the frozen blocks they share once, the others for all at a time.

Candidate i's cut is its lowest block with an adapter. The batch runs once, without gradients, up to the
highest cut; its hidden states are noted at every cut. The pass for all candidates then begins at the lowest
cut with one copy of the rows for each candidate there, and takes in the others where they begin to differ.
A pass is begun and ended inside the model by the blocks' forward methods, so that masks, positions and the
head are made by the model itself, for as many rows as there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.evaluation.frozen_blocks.block_skipping import FrozenBlocks
from autopeft.evaluation.packing.adapters import Member, PackedAdapters
from autopeft.evaluation.packing.layout import Layout, PackingError, Undo, replace_forward
from autopeft.models.backbone import Backbone
from autopeft.tasks.base import Batch
from autopeft.tasks.batch import model_inputs


def cut_of(backbone: Backbone, configuration: Configuration) -> int:
    """Return the number of blocks below a candidate's lowest adapter; all of them where it has none."""
    lowest = configuration.lowest_block
    return len(backbone.blocks) if lowest is None else lowest


class _ReachedStop(Exception):  # noqa: N818
    """Ends a pass inside the model."""


class _BlockBoundaries:
    """Lets a forward pass begin and end between blocks, by their forward methods until `remove`."""

    def __init__(self, backbone: Backbone) -> None:
        self._undo: list[Undo] = []
        self._begin = 0
        self._end: int | None = None
        self._given: Tensor | None = None
        self._noted: dict[int, Tensor] = {}
        self._wanted: frozenset[int] = frozenset()
        self._rest: dict[int, tuple[Any, ...] | None] = {}
        for index, block in enumerate(backbone.blocks):
            self._undo.append(replace_forward(block, partial(self._run, index, block.forward)))

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index < self._begin:
            hidden = self._given if index == self._begin - 1 else args[0]
            rest = self._rest[index]
            return hidden if rest is None else (hidden, *rest)
        output = forward(*args, **kwargs)
        alone = isinstance(output, Tensor)
        self._rest[index] = None if alone else tuple(output[1:])
        if index + 1 in self._wanted:
            self._noted[index + 1] = output if alone else output[0]
        if index + 1 == self._end:
            raise _ReachedStop
        return output

    def passing(
        self,
        call: Callable[[], Any],
        *,
        begin: int = 0,
        end: int | None = None,
        given: Tensor | None = None,
        wanted: frozenset[int] = frozenset(),
    ) -> tuple[Any, dict[int, Tensor]]:
        """Run the model from one block boundary to another.

        Args:
            call: Calls the model.
            begin: Number of blocks to leave out; `given` is what the last of them gives instead.
            end: Number of blocks after which to stop; None to go on to the output.
            given: Hidden states to begin with; None at block 0.
            wanted: Boundaries at which to note the hidden states.

        Returns:
            The model's output (None where it was stopped), and the hidden states noted.
        """
        self._begin, self._end, self._given, self._wanted = begin, end, given, wanted
        self._noted = {}
        try:
            return call(), self._noted
        except _ReachedStop:
            return None, self._noted
        finally:
            self._given, self._noted = None, {}

    def forget(self) -> None:
        """Let go of what the blocks gave beside hidden states."""
        self._rest = {}

    def remove(self) -> None:
        """Give the blocks their forward methods back."""
        while self._undo:
            self._undo.pop()()


class PackedModel:
    """Several candidates on one resident backbone, as one model; use it in a `with` block.

    The backbone's own modules and weights stay in place and untouched; leaving the block takes the hooks out.

    Args:
        backbone: The resident backbone, carrying nothing.
        members: The candidates, in any order.
        without_dropout: Whether embeddings and the blocks below a candidate's cut are run without dropout,
            as `Training.frozen_blocks` says it.

    Raises:
        ValueError: The backbone already carries a configuration.
    """

    def __init__(
        self, backbone: Backbone, members: Sequence[Member], *, without_dropout: bool = False
    ) -> None:
        if backbone.attached is not None:
            raise ValueError(f"{backbone.name} already carries {backbone.attached!r}: detach that one first.")
        self.backbone = backbone
        self.members = tuple(members)
        self.without_dropout = without_dropout
        cuts = [cut_of(backbone, member.configuration) for member in members]
        self._order = sorted(range(len(members)), key=cuts.__getitem__)
        self.cuts = tuple(sorted(cuts))
        self._layout = Layout()
        self._removed = False
        self._adapters = PackedAdapters(
            backbone, [self.members[index] for index in self._order], self._layout
        )
        try:
            self._boundaries = _BlockBoundaries(backbone)
        except BaseException:
            self._adapters.remove()
            raise
        backbone.attached = self.members[0].configuration

    def train(self, mode: bool) -> None:
        """Switch dropout of backbone, adapters and heads."""
        self.backbone.model.train(mode)
        self._adapters.train(mode)

    def zero_grad(self) -> None:
        """Forget all gradients of the candidates."""
        self._adapters.zero_grad()

    def __call__(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Return each candidate's logits, (batch, labels), for one batch that all are given.

        Raises:
            PackingError: The model computes in a way that packing cannot follow.
        """
        inputs = model_inputs(batch)
        ids = next(iter(inputs.values()))
        self._layout.rows, self._layout.tokens = ids.shape[0], ids.shape[1]
        try:
            output = self._passes(inputs)
        finally:
            self._layout.slices = 0
            self._boundaries.forget()
        logits = output.logits.unflatten(0, (len(self.members), -1)).unbind()
        return [logits[self._order.index(index)] for index in range(len(self.members))]

    def _passes(self, inputs: Batch) -> Any:
        cuts = sorted(set(self.cuts))
        shared: dict[int, Tensor] = {}
        if cuts[-1]:
            with torch.no_grad(), self._frozen(cuts[-1]):
                _, shared = self._pass(inputs, 0, end=cuts[-1], wanted=frozenset(cuts))
        output: Any = None
        active: list[Tensor] = []
        for cut, following in pairwise([*cuts, None]):
            assert cut is not None
            joining = self.cuts.count(cut)
            slices = sum(one <= cut for one in self.cuts)
            given = torch.cat([*active, *[shared[cut]] * joining]) if cut else None
            wanted = frozenset() if following is None else frozenset({following})
            with self._frozen(cuts[0]):
                output, noted = self._pass(
                    inputs, slices, begin=cut, end=following, given=given, wanted=wanted
                )
            active = list(noted.values())
        return output

    def _frozen(self, cut: int) -> AbstractContextManager[Any]:
        """Run what lies below a cut without dropout, where that is asked for."""
        if not self.without_dropout:
            return nullcontext()
        return FrozenBlocks(self.backbone.model, self.backbone.blocks, cut)

    def _pass(self, inputs: Batch, slices: int, **how: Any) -> tuple[Any, dict[int, Tensor]]:
        self._layout.slices = slices
        repeated = inputs
        if slices > 1:
            repeated = {name: torch.cat([one] * slices) for name, one in inputs.items()}
        return self._boundaries.passing(lambda: self.backbone.model(**repeated), **how)

    def remove(self) -> None:
        """Take everything out of the backbone. Safe to call again."""
        if self._removed:  # another configuration may be attached by now
            return
        self._removed = True
        self._boundaries.remove()
        self._adapters.remove()
        self.backbone.attached = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def check_agreement(
    backbone: Backbone, members: Sequence[Member], batch: Batch, expected: Sequence[Tensor]
) -> None:
    """Check that a pack gives the logits that its candidates give alone.

    Args:
        backbone: Carries nothing.
        members: Who is packed.
        batch: What goes in.
        expected: What each gives alone.

    Raises:
        PackingError: The logits differ, or the model cannot be packed.
    """
    name = type(backbone.model).__name__
    try:
        with PackedModel(backbone, members) as model, torch.no_grad():
            model.train(False)
            found = model(batch)
    except (PackingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PackingError(
            f"{name} cannot be packed ({type(error).__name__}: {error}): train its candidates one by one."
        ) from error
    for own, alone in zip(found, expected, strict=True):
        tolerance = math.sqrt(torch.finfo(alone.dtype).eps) * max(1e-3, float(alone.abs().max()))
        difference = float((own - alone).abs().max())
        if not difference <= tolerance:
            raise PackingError(
                f"{name} gives other logits in a pack than alone (they differ by {difference:.3g}): a block "
                "is given more than the one below it returns, or mixes rows. Train its candidates one by one."
            )
