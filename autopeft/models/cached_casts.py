"""Frozen matrices in the precision they are multiplied in, cast once and not in every forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from autopeft.core.precision import Precision


class CachedCasts:
    """bfloat16 copies of the weights and biases of linear layers that stay frozen.

    Autocast casts a frozen weight in each forward pass, which for a small model on a CPU takes as long as
    multiplying by it. With the copies in place the same numbers are multiplied: results are those of autocast
    alone, bit for bit. The copies live as long as the `with` block, and take half as many bytes again as
    these layers do. On other devices a cast takes next to no time, and weights are left as they are.

    Args:
        layers: The layers, `nn.Linear` or transformers' Conv1D. What is put around them later (a LoRA layer)
            multiplies by the copies too.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = tuple(layers)

    @contextmanager
    def in_place(self, precision: Precision) -> Iterator[None]:
        """Put the copies in place of frozen single-precision tensors on the CPU; nothing for "32-true"."""
        with ExitStack() as undo:
            for layer in self._layers if precision == "bf16-mixed" else ():
                for name, original in list(layer.named_parameters(recurse=False)):
                    if _is_castable(original):
                        undo.callback(setattr, layer, name, original)
                        setattr(layer, name, _cast(original))
            yield


def _is_castable(tensor: Tensor) -> bool:
    return not tensor.requires_grad and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _cast(original: Tensor) -> nn.Parameter:
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(original.to(torch.bfloat16), requires_grad=False)
