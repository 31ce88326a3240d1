"""The CPU's autocast for meta tensors, which torch's own passes by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


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
        options = dict(kwargs or {})
        if func in _IN_BFLOAT16:
            args, options = tree_map_only(Tensor, self.lowered, (args, options))
        elif func in _IN_SINGLE:
            args, options = tree_map_only(Tensor, _raised, (args, options))
        return func(*args, **options)

    def lowered(self, tensor: Tensor) -> Tensor:
        """Return a tensor in bfloat16; a trainable parameter's copy is kept until the block ends."""
        if not tensor.is_meta or tensor.dtype not in (torch.float32, torch.float16):
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf) or tensor._is_view():
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._cached:
            self._cached[id(tensor)] = tensor, tensor.to(torch.bfloat16)
        return self._cached[id(tensor)][1]


def _raised(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_meta and tensor.dtype == torch.bfloat16 else tensor


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
