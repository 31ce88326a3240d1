"""Frozen matrices in the precision they are multiplied in, cast once and not in every forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopeft.core.precision import Precision


@dataclass(frozen=True)
class _Copy:
    """A tensor in bfloat16, and what it is a copy of."""

    original: Tensor
    version: int
    lowered: nn.Parameter

    def is_of(self, original: Tensor) -> bool:
        return self.original is original and self.version == original._version


class CachedCasts:
    """bfloat16 copies of the weights and biases of linear layers that stay frozen.

    Autocast keeps the casts of weights that require gradients alone, and forgets them after a pass: a frozen
    weight is read, cast and written in each forward pass, which for a small model on a CPU takes as long as
    multiplying by it. With the copies in place there is nothing left to cast. The same numbers are
    multiplied, so that results are those of autocast alone, bit for bit.

    A copy is kept for good, and made anew where its original was replaced or changed in place (a change
    through `.data` is not seen). All take half as many bytes again as these layers do. On other devices,
    where memory is what is short and a cast takes next to no time, the weights are left as they are.

    Args:
        layers: The layers, `nn.Linear` or transformers' Conv1D. What is put around them later (a LoRA layer)
            multiplies by the copies too.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._holders = [layer._parameters for layer in layers]
        self._copies: dict[tuple[int, str], _Copy] = {}

    @contextmanager
    def in_place(self, precision: Precision) -> Iterator[None]:
        """Put the copies in place of frozen single-precision tensors on the CPU; use it with autocast.

        Args:
            precision: What the model computes in; there is nothing to do for "32-true".
        """
        originals: list[tuple[int, str, nn.Parameter]] = []
        try:
            for index, holder in enumerate(self._holders if precision == "bf16-mixed" else ()):
                for name, original in holder.items():
                    if original is not None and _is_castable(original):
                        originals.append((index, name, original))
                        holder[name] = self._lowered(index, name, original)
            yield
        finally:
            for index, name, original in originals:
                self._holders[index][name] = original

    def _lowered(self, index: int, name: str, original: nn.Parameter) -> nn.Parameter:
        known = self._copies.get((index, name))
        if known is None or not known.is_of(original):
            with torch.inference_mode(False), torch.no_grad():
                lowered = nn.Parameter(original.to(torch.bfloat16), requires_grad=False)
            known = self._copies[index, name] = _Copy(original, original._version, lowered)
        return known.lowered


def _is_castable(tensor: Tensor) -> bool:
    return not tensor.requires_grad and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
