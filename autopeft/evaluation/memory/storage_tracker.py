"""Count the bytes of the storages that operations make, while they are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopeft.core.precision import Precision, autocast
from autopeft.tasks.base import Loss
from autopeft.tasks.batch import LABELS, model_inputs


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
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and torch's guard against it is a third of an operation's time.
        return False

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
        if storage._cdata not in self._known:
            self._track_new(storage, storage.nbytes(), tensor.shape)

    def _track_new(self, storage: torch.UntypedStorage, nbytes: int, shape: Sequence[int]) -> None:
        """Count a storage, first seen in a tensor of a shape."""
        known, key = self._known, storage._cdata

        def died(_: object) -> None:
            if known.pop(key, None) is not None:
                self.live_bytes -= nbytes

        known[key] = weakref.ref(storage, died)
        self.live_bytes += nbytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and track what it made."""
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, Tensor):
            self._track(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._track(leaf)
        return result


def measure_live_storage(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss: Loss,
    *,
    steps: int = 2,
    precision: Precision = "32-true",
) -> int:
    """Return the peak live bytes of real optimizer steps on the CPU: what `MemoryCounter` predicts.

    Trains the model's trainable parameters for `steps` steps.
    """
    inputs = model_inputs(batch)
    trainable = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    counter = StorageCounter()
    base = counter.exclude((*inputs.values(), batch[LABELS], *model.parameters(), *model.buffers()))
    with counter:
        for _ in range(steps):
            with autocast(precision, "cpu"):
                value = loss(model(**inputs).logits, batch[LABELS])
            optimizer.zero_grad()
            value.backward()
            del value
            optimizer.step()
    return base + counter.peak_bytes
