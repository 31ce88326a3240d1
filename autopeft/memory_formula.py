"""Peak training memory as a formula in the adapters' sizes: one count serves all of them.

Configurations with the same adapters at the same sites differ in ranks, widths and lengths alone. The same
operations run in the same order, and every tensor has at most one size among its dimensions, once, perhaps
with something added (a prefix in front of the tokens). So the bytes alive at any moment are linear in the
sizes, and the peak is the largest of a few linear functions. They are found by following one step on meta
tensors whose sizes are numbers that no real dimension has.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autopeft.memory_count import MemoryCount
from autopeft.meta_tensors import SYMBOL_ROOM, SYMBOLIC, MetaCounter

Rows: TypeAlias = NDArray[np.int64]
"""Linear functions, one a row: a constant, and a factor for each size."""


class NotLinearError(Exception):
    """A tensor's bytes are not linear in one size."""


@dataclass(frozen=True)
class AdapterSize:
    """The size of one adapter, and which dimensions of its parameters it is.

    Attributes:
        name: Tells the adapter from all others of a model, in every configuration alike.
        value: Rank, bottleneck width or prefix length.
        dimensions: Parameters that have the size as a dimension, and which of their dimensions that is.
    """

    name: Hashable
    value: int
    dimensions: tuple[tuple[nn.Parameter, int], ...]


@dataclass(frozen=True)
class SizedAdapters:
    """What is attached to a model.

    Attributes:
        kind: Everything about it but the sizes.
        sizes: The sizes, those of equal kinds in the same order.
    """

    kind: Hashable
    sizes: tuple[AdapterSize, ...]

    @property
    def values(self) -> list[int]:
        """The sizes alone."""
        return [one.value for one in self.sizes]


class _Bytes(NamedTuple):
    """`constant` bytes, and `factor` for each unit of the size in `column` (0 where there is none)."""

    constant: int
    column: int = 0
    factor: int = 0


class Symbols:
    """Numbers that stand for sizes, as dimensions of meta tensors.

    Args:
        numbers: A number for every adapter seen so far, by its name; filled. An adapter keeps its number, so
            that operations on it are remembered from one model to the next.
        sizes: The sizes of the model at hand.
    """

    def __init__(self, numbers: dict[Hashable, int] | None = None, sizes: Sequence[AdapterSize] = ()) -> None:
        self.count = len(sizes)
        self._columns: dict[int, int] = {}
        self._dimensions: dict[int, tuple[int, int]] = {}
        numbers = {} if numbers is None else numbers
        for column, size in enumerate(sizes, 1):
            number = numbers.setdefault(size.name, len(numbers))
            self._columns[number] = column
            for parameter, dimension in size.dimensions:
                self._dimensions[id(parameter)] = dimension, SYMBOLIC + number * SYMBOL_ROOM

    def convert(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the meta device, with symbols for its sizes."""
        found = self._dimensions.get(id(tensor))
        if found is None:
            made = torch.empty_like(tensor, device="meta")
        else:
            shape = list(tensor.shape)
            shape[found[0]] = found[1]
            made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return made.requires_grad_(tensor.requires_grad)

    def bytes_of(self, shape: Iterable[int], size: int) -> _Bytes:
        """Return what a dense tensor's bytes are in sizes.

        Raises:
            NotLinearError: They are not linear in one size.
        """
        symbolic = [one for one in shape if one >= SYMBOLIC]
        if not symbolic:
            if size >= SYMBOLIC and size % SYMBOLIC == 0:
                raise NotLinearError("a size hides in a storage that is no dense tensor")
            return _Bytes(size)
        number, added = divmod(symbolic[0] - SYMBOLIC, SYMBOL_ROOM)
        if len(symbolic) > 1 or number not in self._columns or size % symbolic[0]:
            raise NotLinearError(f"a tensor has the shape {tuple(shape)}")
        factor = size // symbolic[0]
        return _Bytes(factor * added, self._columns[number], factor)

    def rows(self, several: Iterable[_Bytes]) -> Rows:
        """Return linear functions, one a row."""
        listed = np.array([*several], dtype=np.int64).reshape(-1, 3)
        constants, columns, factors = listed.T
        rows = np.zeros((len(listed), 1 + self.count), dtype=np.int64)
        rows[:, 0] = constants
        rows[np.arange(len(listed)), columns] += factors
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
        self._made: list[tuple[int, Sequence[int]]] = []  # bytes and shape
        self._moments: list[int] = []  # the number of what was made, its complement for what died
        self._restarts: list[int] = []

    def exclude(self, tensors: Iterable[Tensor]) -> int:
        """Leave out storages that were there before; return their bytes, with symbols for sizes."""
        known = len(self._made)
        super().exclude(tensors)
        self._moments.clear()
        self._restarts.clear()
        return sum(size for size, _ in self._made[known:])

    def restart_peak(self) -> None:
        """Begin another pass, for `peaks`."""
        super().restart_peak()
        self._restarts.append(len(self._moments))

    def _track_new(self, storage: torch.UntypedStorage, size: int, shape: Sequence[int]) -> None:
        known, key, moments = self._known, storage._cdata, self._moments
        number = len(self._made)
        self._made.append((size, shape))

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
        sizes = self._symbols.rows(self._symbols.bytes_of(shape, size) for size, shape in self._made)
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


@dataclass(frozen=True, kw_only=True)
class MemoryFormula:
    """The memory of all configurations of a kind.

    Attributes:
        parameters: Bytes of parameters and buffers, frozen ones included.
        batch_bytes: Bytes of the batch.
        trainable: Bytes of each trainable parameter.
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
        trainable = self.trainable @ values
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
        NotLinearError: Some parameter's bytes are not linear in one size.
    """
    forward, backward = counter.peaks()
    every = symbols.rows(_bytes(symbols, one) for one in (*parameters, *buffers))
    return MemoryFormula(
        parameters=every.sum(axis=0),
        batch_bytes=batch_bytes,
        trainable=symbols.rows(_bytes(symbols, one) for one in parameters if one.requires_grad),
        forward=forward,
        backward=backward,
    )


def _bytes(symbols: Symbols, tensor: Tensor) -> _Bytes:
    return symbols.bytes_of(tensor.shape, tensor.untyped_storage().nbytes())


def _largest(rows: Rows) -> Rows:
    """Leave out functions that another is nowhere below: sizes are positive."""
    rows = np.unique(rows, axis=0)
    kept = []
    while len(rows):
        highest = rows[rows.sum(axis=1).argmax()]
        kept.append(highest)
        rows = rows[(rows > highest).any(axis=1)]
    return np.array(kept)
