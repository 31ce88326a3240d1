"""The CPU's autocast for meta tensors, which torch's own passes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class MetaAutocast(TorchFunctionMode):
    """Cast what `torch.autocast("cpu", torch.bfloat16)` would cast; use it in a `with` block.

    The functions are those of torch's list that models of transformers, their adapters and losses call
    (https://docs.pytorch.org/docs/stable/amp.html#cpu-op-specific-behavior). A model that calls others of
    the list is found out: its memory differs from that counted on fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cached: dict[int, tuple[Tensor, Tensor]] = {}

    def __exit__(self, *reason: Any) -> None:
        """Leave, and forget the parameters' copies, as autocast does."""
        self._cached.clear()
        super().__exit__(*reason)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function with its arguments cast."""
        options = kwargs or {}
        cast = self.lowered if func in _IN_BFLOAT16 else _raised if func in _IN_SINGLE else None
        if cast is not None:
            args = tuple(map(cast, args))
            options = {name: cast(one) for name, one in options.items()}
        return func(*args, **options)

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


_IN_BFLOAT16 = frozenset(
    {
        functional.linear,
        functional.conv1d,
        functional.scaled_dot_product_attention,
        torch.addmm,
        torch.baddbmm,
        torch.bmm,
        torch.matmul,
        torch.mm,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.bmm,
        Tensor.matmul,
        Tensor.mm,
    }
)
_IN_SINGLE = frozenset({functional.cross_entropy, functional.mse_loss, functional.nll_loss})
