"""How the rows of a packed batch belong to candidates, and the ways an adapter may act on its slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Undo = Callable[[], None]


class PackingError(ValueError):
    """A model computes in a way that packed candidates cannot follow; train them one by one."""


class Layout:
    """The slices of the pass at hand: slice i, a batch of rows of its own, is candidate i's.

    Attributes:
        slices: Number of candidates in the pass; 0 while the frozen prefix they share is computed.
        rows: Rows of one candidate's batch.
        tokens: Tokens of a row.
        training: Whether dropout is on.
    """

    def __init__(self) -> None:
        self.slices = 0
        self.rows = 0
        self.tokens = 0
        self.training = False

    def sliced(self, tensor: Tensor, name: str) -> Tensor:
        """View (slices × rows, ...) as (slices, rows, ...); rows and tokens may be one dimension.

        Raises:
            PackingError: The leading dimension is something else.
        """
        whole = self.slices * self.rows
        if self.slices > 1 and tensor.shape[0] not in (whole, whole * self.tokens):
            raise PackingError(
                f"{name} is given a tensor of shape {tuple(tensor.shape)}, expected {whole} rows "
                f"({self.slices} candidates × {self.rows}): the model cannot be packed."
            )
        slices: Tensor = tensor.unflatten(0, (self.slices, -1))
        return slices

    def matrices(self, tensor: Tensor, name: str) -> Tensor:
        """View (slices × rows, ..., features) as (slices, vectors, features)."""
        return self.sliced(tensor, name).flatten(1, -2)


class PerSlice:
    """A forward method that runs each candidate's copy of a module on its slice.

    Args:
        layout: The slices of the pass.
        name: The module's name, for errors.
        forward: The frozen module's own forward method, for candidates without a copy.
        copies: The copies, by candidate.
    """

    def __init__(
        self, layout: Layout, name: str, forward: Callable[..., Tensor], copies: Mapping[int, nn.Module]
    ) -> None:
        self.layout = layout
        self.name = name
        self.forward = forward
        self.copies = copies

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the slices' outputs, one after another."""
        if not self.layout.slices:
            return self.forward(hidden, *args, **kwargs)
        slices = self.layout.sliced(hidden, self.name).unbind()
        outputs: list[Tensor] = [
            self.copies.get(index, self.forward)(one, *args, **kwargs) for index, one in enumerate(slices)
        ]
        return torch.cat(outputs)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Put another forward method in a module, under its hooks; return what takes it out."""
    module.forward = forward

    def undo() -> None:
        del module.forward

    return undo


def give_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in a module under their qualified names."""
    for name, parameter in parameters.items():
        parent, _, local = name.rpartition(".")
        setattr(module.get_submodule(parent), local, parameter)
