"""Run a model without data, quickly: meta tensors that remember shapes, and take the CPU's kernels.

A fake CPU tensor takes every path the CPU would take, at about 0.1 ms an operation. A meta tensor whose
output shapes are remembered takes a tenth of that. Where an operation chooses its kernel by the device, a
meta tensor has to be told: for the models of transformers that is attention alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from autopeft.evaluation.memory.storage_tracker import StorageCounter

SYMBOLIC = 1 << 34
"""Dimensions from here to twice as much stand for sizes that are left open (`size_formula`)."""
SYMBOL_ROOM = 1 << 20
"""From one symbol to the next: half of it may be added to a size, or taken off."""

_FLASH = int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)


def symbol(number: int) -> int:
    """Return the dimension that stands for a size, one a number."""
    return SYMBOLIC + number * SYMBOL_ROOM + SYMBOL_ROOM // 2


def symbol_parts(dimension: int) -> tuple[int, int]:
    """Return the number of the symbol in a dimension, and what was added to it."""
    number, rest = divmod(dimension - SYMBOLIC, SYMBOL_ROOM)
    return number, rest - SYMBOL_ROOM // 2


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same make on the meta device."""
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


@contextmanager
def cpu_attention(remembered: dict[Any, Any], cast: Callable[[Any], Any] | None = None) -> Iterator[None]:
    """Let attention on meta tensors take the kernel that the CPU would take.

    `scaled_dot_product_attention` asks the tensors' device which kernel is best, and the meta device knows
    of none: it computes step by step, and would keep the attention matrix, where the CPU takes its flash
    kernel (without dropout, and with a mask that needs no gradient) and keeps one row sum a query.

    The function is replaced where models look it up, as a mode over all functions is a third of a count's
    time. A model that has it under another name is found out: its count differs from that on fake tensors.

    Args:
        remembered: Kernels by what decides them; filled.
        cast: What autocast does to the arguments; None without it.
    """

    def attend(query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if not query.is_meta:
            return scaled_dot_product_attention(query, *arguments, **options)
        if cast is not None:
            query, arguments = cast(query), tuple(map(cast, arguments))
            options = {name: cast(one) for name, one in options.items()}
        return _attend(remembered, query, *arguments, **options)

    replaced = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = replaced


def _attend(
    remembered: dict[Any, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    needs = tuple(one.requires_grad for one in tensors), torch.is_grad_enabled()
    case = ("attention", _signature(tensors), needs, dropout_p, is_causal, scale, enable_gqa)
    if case not in remembered:
        remembered[case] = _choice(tensors, dropout_p, is_causal, scale, enable_gqa)
    if remembered[case] != _FLASH:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # As the CPU does it: nothing but the new mask outlives this line.
        attn_mask = torch.where(
            attn_mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=_META)
        )
    attended: Tensor
    attended, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )
    return attended


def _choice(
    tensors: Sequence[Tensor], dropout: float, causal: bool, scale: float | None, grouped: bool
) -> int:
    """Return the kernel that the CPU takes for query, key, value and perhaps a mask."""
    with _disable_current_modes():
        query, key, value, *mask = [_unwritten(one) for one in tensors]
        return int(
            torch._fused_sdp_choice(
                query,
                key,
                value,
                mask[0] if mask else None,
                dropout,
                causal,
                scale=scale,
                enable_gqa=grouped,
            )
        )


def _unwritten(tensor: Tensor) -> Tensor:
    """Return a CPU tensor of the same make; its memory is asked for and never touched.

    A symbol for a size becomes some size: kernels are not chosen by lengths.
    """
    if all(one < SYMBOLIC for one in tensor.shape):
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    else:
        order = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
        shape = [one if one < SYMBOLIC else max(1, symbol_parts(one)[1]) for one in tensor.shape]
        made = torch.empty([shape[one] for one in order], dtype=tensor.dtype)
        made = made.permute([order.index(one) for one in range(tensor.ndim)])
    return made.requires_grad_(tensor.requires_grad)


class MetaCounter(StorageCounter):
    """Count on meta tensors, remembering what shapes an operation gives for what shapes.

    There are three kinds of operations, told apart by their schema:

    - `_NOTHING_NEW`: all results share storage with an argument (views, in-place). It is run, which is
      quick, and not looked at.
    - `_MAYBE_NEW`: some results may be new, or one is seen for the first time (as `torch.tensor` gives it).
      It is run, and what is new is tracked.
    - `_ALL_NEW`: no result shares storage with an argument. Results are made from memory.

    Asking for a value (as transformers does to learn whether a mask pads anything) is answered with False:
    the largest batch is a padded one.
    """

    def __init__(self, remembered: dict[Any, Any]) -> None:
        super().__init__()
        self._remembered = remembered

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Make the operation's result, and track it."""
        number = id(func)  # operations live as long as the process, and hash slowly
        kind = _KINDS.get(number)
        if kind is None:
            kind = _KINDS[number] = _kind(func)
        if kind is _NOTHING_NEW:
            return func(*args, **kwargs) if kwargs else func(*args)
        if kind is _MAYBE_NEW:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if number == _VALUE:
            return False
        key: Any = number, _signature(args)
        if kwargs:
            key = *key, tuple(kwargs), _signature(kwargs.values())
        try:
            remembered = self._remembered.get(key)
        except TypeError:  # an argument that cannot be hashed
            return super().__torch_dispatch__(func, types, args, kwargs)
        if remembered is None:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self._remembered[key] = _recipe(result, (*args, *(kwargs or {}).values()))
            return result
        if remembered is _RUN:
            return super().__torch_dispatch__(func, types, args, kwargs)
        single, recipes = remembered
        if single:
            return self._make(*recipes[0])
        return tuple([None if one is None else self._make(*one) for one in recipes])

    def _make(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=_META)
        self._track_new(tensor.untyped_storage(), size, shape)
        return tensor


_VALUE = id(torch.ops.aten._local_scalar_dense.default)
_RUN = object()
_META = torch.device("meta")
_NOTHING_NEW, _MAYBE_NEW, _ALL_NEW = object(), object(), object()
_FIRST_SIGHT = torch.ops.aten.lift_fresh.default  # of a tensor made of numbers; by its schema, a view
_KINDS: dict[int, object] = {}


def _kind(func: Any) -> object:
    """Return what an operation gives; see `MetaCounter`."""
    if func is _FIRST_SIGHT:
        return _MAYBE_NEW
    schema = func._schema
    if all(argument.alias_info is None for argument in schema.arguments):
        return _ALL_NEW
    shares = all(result.alias_info is not None for result in schema.returns)
    return _NOTHING_NEW if shares and schema.returns else _MAYBE_NEW


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """Return what decides the shapes of a result: shapes of tensors, and other arguments as they are."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found += value.shape, value.stride(), value.dtype
        elif isinstance(value, list | tuple):
            found.append(_signature(value))
        else:
            found += type(value), value
    return tuple(found)


def _recipe(result: Any, arguments: Iterable[Any]) -> Any:
    """Return how to make a result anew, or `_RUN` where it is not made of fresh, dense tensors."""
    several = (result,) if isinstance(result, Tensor) else result
    if not isinstance(several, tuple):
        return _RUN
    given = {one.untyped_storage()._cdata for one in tree_leaves(list(arguments)) if isinstance(one, Tensor)}
    recipes: list[tuple[Any, ...] | None] = []
    for one in several:
        if one is None:
            recipes.append(None)
            continue
        if not isinstance(one, Tensor) or one.untyped_storage()._cdata in given:
            return _RUN
        if one.untyped_storage().nbytes() != one.numel() * one.element_size():
            return _RUN
        recipes.append((one.shape, one.stride(), one.dtype, one.untyped_storage().nbytes()))
    return isinstance(result, Tensor), tuple(recipes)
