"""Peak training memory as a formula in the adapters' sizes: one count serves all of them.

Configurations with the same adapters and options at the same sites differ in ranks, widths and lengths alone.
The same operations run in the same order, and every tensor has at most one size among its dimensions, once,
perhaps with something added (a prefix in front of the tokens). So the bytes alive at any moment are linear in
the sizes, and the peak is the largest of a few linear functions. They are found by following one step on meta
tensors whose sizes are numbers that no real dimension has.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autopeft.evaluation.memory.meta_tracing import (
    SYMBOL_ROOM,
    SYMBOLIC,
    MetaCounter,
    on_meta,
    symbol,
    symbol_parts,
)
from autopeft.evaluation.memory.peak import MemoryCount

Rows: TypeAlias = NDArray[np.int64]
"""Linear functions, one a row: a constant, and a factor for each size."""

_LARGEST_REAL = 1 << 24  # what lies between it and the symbols may be a part or a multiple of one
_ITEM_BYTES = (1, 2, 4, 8, 16)


class NotLinearError(Exception):
    """A tensor's bytes are not linear in one size."""


@dataclass(frozen=True, eq=False)
class AdapterSize:
    """The size of one adapter, and which dimensions of its parameters it is.

    Attributes:
        name: Tells the adapter from all others of a model, in every configuration alike.
        value: Rank, bottleneck width or prefix length.
        dimensions: Parameters that have the size as a dimension, and which of their dimensions that is.

    Raises:
        ValueError: There is no such parameter, or one has another length there.
    """

    name: Hashable
    value: int
    dimensions: tuple[tuple[nn.Parameter, int], ...]

    def __post_init__(self) -> None:
        lengths = [parameter.shape[dimension] for parameter, dimension in self.dimensions]
        if not lengths or any(one != self.value for one in lengths):
            raise ValueError(f"The size of {self.name} is {self.value}, its parameters have {lengths}.")


@dataclass(frozen=True, eq=False)
class SizedAdapters:
    """What is attached to a model.

    Attributes:
        structure: Everything about it but the sizes.
        methods: The methods, with their options.
        sizes: The sizes, those of equal structures in the same order.
    """

    structure: Hashable
    methods: frozenset[Hashable]
    sizes: tuple[AdapterSize, ...]

    @property
    def values(self) -> list[int]:
        """The sizes alone."""
        return [one.value for one in self.sizes]


class Resized:
    """Converts a model's tensors to meta tensors, with other sizes.

    Args:
        sizes: The sizes of the model at hand.
        lengths: What they are to be.
    """

    def __init__(self, sizes: Sequence[AdapterSize], lengths: Sequence[int]) -> None:
        self._dimensions = {
            id(parameter): (dimension, length)
            for size, length in zip(sizes, lengths, strict=True)
            for parameter, dimension in size.dimensions
        }
        self._unseen = set(self._dimensions)

    @property
    def has_seen_all(self) -> bool:
        """Whether every parameter that has a size was converted."""
        return not self._unseen

    def convert(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the meta device."""
        if id(tensor) not in self._dimensions:
            return on_meta(tensor)
        self._unseen.discard(id(tensor))
        dimension, length = self._dimensions[id(tensor)]
        shape = list(tensor.shape)
        shape[dimension] = length
        made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return made.requires_grad_(tensor.requires_grad)


class _Bytes(NamedTuple):
    """`constant` bytes, and `factor` for each unit of the size in `column` (0 where there is none)."""

    constant: int
    column: int = 0
    factor: int = 0


class Symbols(Resized):
    """Numbers that stand for sizes, as dimensions of meta tensors.

    Args:
        numbers: A number for every adapter seen so far, by its name; filled. An adapter keeps its number, so
            that operations on it are remembered from one model to the next.
        sizes: The sizes of the model at hand.

    Raises:
        NotLinearError: There are more adapters than symbols.
    """

    def __init__(self, numbers: dict[Hashable, int], sizes: Sequence[AdapterSize]) -> None:
        own = [numbers.setdefault(one.name, len(numbers)) for one in sizes]
        if max(own, default=0) >= SYMBOLIC // SYMBOL_ROOM:
            raise NotLinearError("there are more adapters than symbols for sizes")
        super().__init__(sizes, [symbol(number) for number in own])
        self._columns = {number: column for column, number in enumerate(own, 1)}

    def bytes_of(self, shape: Sequence[int], nbytes: int) -> _Bytes:
        """Return what a storage's bytes are in sizes.

        Args:
            shape: Of a tensor with this storage.
            nbytes: Its bytes.

        Raises:
            NotLinearError: They are not linear in one size.
        """
        large = [one for one in shape if one >= _LARGEST_REAL]
        elements = math.prod(shape)
        is_dense = any(nbytes == elements * one for one in _ITEM_BYTES)
        if not large and (is_dense or nbytes < _LARGEST_REAL):
            return _Bytes(nbytes)
        if not is_dense or len(large) > 1 or large[0] < SYMBOLIC:
            raise NotLinearError(f"a tensor has the shape {tuple(shape)}, and {nbytes} bytes")
        number, added = symbol_parts(large[0])
        if number not in self._columns:
            raise NotLinearError(f"a tensor has the shape {tuple(shape)}")
        factor = nbytes // large[0]
        return _Bytes(factor * added, self._columns[number], factor)

    def rows(self, several: Iterable[_Bytes]) -> Rows:
        """Return linear functions, one a row."""
        constants, columns, factors = _table(several).T
        rows = np.zeros((len(constants), 1 + len(self._columns)), dtype=np.int64)
        rows[:, 0] = constants
        rows[np.arange(len(constants)), columns] += factors
        return rows


class SymbolicCounter(MetaCounter):
    """Note when storages are made and when they die, with their bytes as functions of the sizes.

    Args:
        remembered: See `MetaCounter`.
        symbols: Those of the model at hand.
    """

    def __init__(self, remembered: dict[Any, Any], symbols: Symbols) -> None:
        super().__init__(remembered)
        self._symbols = symbols
        self._made: list[tuple[Sequence[int], int]] = []  # shape and bytes
        self._moments: list[int] = []  # the number of what was made, its complement for what died
        self._restarts: list[int] = []

    def exclude(self, tensors: Iterable[Tensor]) -> int:
        """Leave out storages that were there before; return their bytes, with symbols for sizes."""
        known = len(self._made)
        super().exclude(tensors)
        self._moments.clear()
        self._restarts.clear()
        return sum(nbytes for _, nbytes in self._made[known:])

    def restart_peak(self) -> None:
        """Begin another pass, for `peaks`."""
        super().restart_peak()
        self._restarts.append(len(self._moments))

    def _track_new(self, storage: torch.UntypedStorage, nbytes: int, shape: Sequence[int]) -> None:
        known, key, moments = self._known, storage._cdata, self._moments
        number = len(self._made)
        self._made.append((shape, nbytes))

        def died(_: object) -> None:
            if known.pop(key, None) is not None:
                moments.append(~number)

        known[key] = weakref.ref(storage, died)
        moments.append(number)

    def peaks(self) -> list[Rows]:
        """Return for each pass that `restart_peak` ended the bytes alive when there can be most.

        Raises:
            NotLinearError: Some tensor's bytes are not linear in one size.
        """
        moments = np.array(self._moments, dtype=np.int64)
        is_made = moments >= 0
        sizes = self._symbols.rows(self._symbols.bytes_of(*one) for one in self._made)
        changes = sizes[np.where(is_made, moments, ~moments)]
        changes[~is_made] *= -1
        alive = np.vstack([np.zeros((1, changes.shape[1]), dtype=np.int64), changes.cumsum(axis=0)])
        after_growth = np.concatenate([[True], is_made])
        found = []
        for begin, end in pairwise([0, *self._restarts]):
            before_fall = np.append(~is_made[begin:end], True)
            highest = after_growth[begin : end + 1] & before_fall
            highest[0] = True
            found.append(_largest(alive[begin : end + 1][highest]))
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class MemoryFormula:
    """The memory of all configurations of a structure.

    Attributes:
        parameters: Bytes of parameters and buffers, frozen ones included: one linear function.
        batch_bytes: Bytes of the batch.
        trainable: Of each trainable parameter the bytes: constant, place of its size (from 1), factor.
        forward: Bytes that the forward pass made and that are alive, at the moments that can be its peak.
        backward: The same of the backward pass, what the forward pass left included.
    """

    parameters: Rows
    batch_bytes: int
    trainable: Rows
    forward: Rows
    backward: Rows

    def count(self, sizes: Sequence[int]) -> MemoryCount:
        """Return the memory for sizes, in the order of `SizedAdapters.sizes`."""
        values = np.array([1, *sizes], dtype=np.int64)
        constants, columns, factors = self.trainable.T
        trainable = constants + factors * values[columns]
        return MemoryCount.of_step(
            parameter_bytes=int(self.parameters @ values),
            batch_bytes=self.batch_bytes,
            trainable_bytes=int(trainable.sum()),
            trainable_tensors=len(trainable),
            largest_bytes=int(trainable.max(initial=0)),
            forward_peak=int((self.forward @ values).max()),
            backward_peak=int((self.backward @ values).max()),
        )


def formula_of(
    symbols: Symbols,
    counter: SymbolicCounter,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
    batch_bytes: int,
) -> MemoryFormula:
    """Return the formula, once a step was followed.

    Args:
        symbols: Those of the model.
        counter: Saw the forward and the backward pass, a restart at the end of each.
        parameters: The model's, converted.
        buffers: The same.
        batch_bytes: Bytes of the batch.

    Raises:
        NotLinearError: Some tensor's bytes are not linear in one size, or one with a size is not the model's.
    """
    if not symbols.has_seen_all:
        raise NotLinearError("a parameter with a size is not in the model")
    forward, backward = counter.peaks()
    every = symbols.rows(_bytes_of(symbols, one) for one in (*parameters, *buffers))
    return MemoryFormula(
        parameters=every.sum(axis=0),
        batch_bytes=batch_bytes,
        trainable=_table(_bytes_of(symbols, one) for one in parameters if one.requires_grad),
        forward=forward,
        backward=backward,
    )


def _bytes_of(symbols: Symbols, tensor: Tensor) -> _Bytes:
    return symbols.bytes_of(tensor.shape, tensor.untyped_storage().nbytes())


def _table(several: Iterable[_Bytes]) -> Rows:
    return np.array([*several], dtype=np.int64).reshape(-1, 3)


def _largest(rows: Rows) -> Rows:
    """Leave out functions that another is nowhere below: sizes are positive."""
    rows = np.unique(rows, axis=0)
    kept = []
    while len(rows):
        highest = rows[rows.sum(axis=1).argmax()]
        kept.append(highest)
        rows = rows[(rows > highest).any(axis=1)]
    return np.array(kept)
