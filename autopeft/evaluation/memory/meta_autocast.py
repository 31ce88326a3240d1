"""The CPU's autocast for meta tensors, which torch's own passes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_Cast = Callable[[Any], Any]


class MetaAutocast:
    """Cast what `torch.autocast("cpu", torch.bfloat16)` would cast.

    The functions are those of torch's list that models of transformers, their adapters and losses call
    (https://docs.pytorch.org/docs/stable/amp.html#cpu-op-specific-behavior), but for attention, which
    `cpu_attention` sees to. They are replaced where models look them up: a mode over all functions takes a
    fifth of a count's time. A model that calls others of the list, or has them under other names, is found
    out: its memory differs from that counted on fake tensors.
    """

    def __init__(self) -> None:
        self._cached: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Cast in a `with` block; at its end the parameters' copies are forgotten, as autocast does it."""
        replaced = [
            (owner, name, vars(owner).get(name))
            for owners in (_IN_BFLOAT16, _IN_SINGLE)
            for owner, names in owners.items()
            for name in names
        ]
        try:
            for owners, cast in ((_IN_BFLOAT16, self.lowered), (_IN_SINGLE, _raised)):
                for owner, names in owners.items():
                    for name in names:
                        setattr(owner, name, _with_cast(getattr(owner, name), cast))
            yield
        finally:
            for owner, name, original in replaced:
                if original is None:  # inherited
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
            self._cached.clear()

    def lowered(self, value: Any) -> Any:
        """Return a tensor in bfloat16; a trainable parameter's copy is kept until the block ends."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.is_meta:
            return value
        if not (value.requires_grad and value.is_leaf) or value._is_view():
            return value.to(torch.bfloat16)
        if id(value) not in self._cached:
            self._cached[id(value)] = value, value.to(torch.bfloat16)
        return self._cached[id(value)][1]


def _raised(value: Any) -> Any:
    lowered = isinstance(value, Tensor) and value.is_meta and value.dtype == torch.bfloat16
    return value.float() if lowered else value


def _with_cast(function: Callable[..., Any], cast: _Cast) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if options:
            options = {name: cast(one) for name, one in options.items()}
        return function(*map(cast, arguments), **options)

    return call


_IN_BFLOAT16: Mapping[Any, tuple[str, ...]] = {
    functional: ("linear", "conv1d"),
    torch: ("addmm", "baddbmm", "bmm", "matmul", "mm"),
    Tensor: ("__matmul__", "__rmatmul__", "bmm", "matmul", "mm"),
}
_IN_SINGLE: Mapping[Any, tuple[str, ...]] = {functional: ("cross_entropy", "mse_loss", "nll_loss")}
