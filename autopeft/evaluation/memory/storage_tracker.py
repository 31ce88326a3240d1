"""Tensors without data, and the bytes of the storages that operations on them make.

This is the one module that uses torch's fake tensors and dispatch modes. Both are documented, but live in
modules with a leading underscore: no public name gives the shapes and lifetimes of a step without running it.
Of `FakeTensorMode` it extends `dispatch`, and of a fake tensor it reads `fake_device`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GROUPED_PRODUCT: Any = torch.ops.aten._grouped_mm
"""The operation of `torch.nn.functional.grouped_mm`, by which transformers' experts multiply."""
_DEVICE: Any = torch.ops.prim.device.default  # two of three operations only ask where a fake tensor lies


class StorageCounter(TorchDispatchMode):
    """Count the bytes of live storages that operations make while the mode is on.

    Attributes:
        live_bytes: Bytes of the storages alive now.
        peak_bytes: Largest value of `live_bytes` since the last `restart_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        # By id, which no other storage can have before its entry is removed.
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def exclude(self, tensors: Iterable[Tensor]) -> int:
        """Leave out storages that were there before; return their bytes, each storage once."""
        before = self.live_bytes
        for tensor in tensors:
            self._track(tensor)
        found = self.live_bytes - before
        self.live_bytes = before
        self.restart_peak()
        return found

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak_bytes = self.live_bytes

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known, key, nbytes = self._known, id(storage), storage.nbytes()
        if key in known:
            return

        def died(_: object) -> None:
            if known.pop(key, None) is not None:
                self.live_bytes -= nbytes

        known[key] = weakref.ref(storage, died)
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and track what it made."""
        if func is _DEVICE:
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            self._track(tensor)
        return result


def _tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        if result.layout == torch.strided:  # a sparse one's numbers are tensors that were there before
            yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors_in(part)


class _ShapesAlone(FakeTensorMode):
    """Fake tensors that know two operations more.

    Grouped products in any precision: torch's rule for their shapes knows bfloat16 alone. A draw of a single
    number is 0.5: peft's LyCORIS layers compare one with the dropout of a whole module.
    """

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run the operation on shapes alone."""
        if func is GROUPED_PRODUCT.default and args[0].dtype != torch.bfloat16:
            first, second, *others = args
            product = func(first.bfloat16(), second.bfloat16(), *others, **(kwargs or {}))
            return product.to(first.dtype)
        if func is torch.ops.aten.rand.default and list(args[0]) == [1]:
            with self:
                return torch.tensor([0.5])
        return super().dispatch(func, types, args, kwargs or {})


@contextmanager
def without_data() -> Iterator[Callable[[Tensor], Tensor]]:
    """Compute with shapes alone in a `with` block, on what the given function makes of real tensors.

    It returns tensors without data on the CPU, as a count must not depend on where the model lies.
    """
    # What layers keep outside their buffers, as indices, comes in as it is met.
    with _ShapesAlone(allow_non_fake_inputs=True) as mode:

        def fake(tensor: Tensor) -> Tensor:
            copy: Tensor = mode.from_tensor(tensor)
            if copy.device.type != "cpu":
                copy = copy.detach().cpu().requires_grad_(tensor.requires_grad)
            return copy

        yield fake
