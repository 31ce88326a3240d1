"""Cross entropy over a vocabulary, a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autopeft.tasks.batch import IGNORED

_AT_ONCE = 128  # tokens


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy summed over tokens, a scalar in single precision.

    In single precision, the logits of a vocabulary, their softmax and its gradient are most of what training
    a language model takes. Here they exist for a few tokens, once in each pass.

    Args:
        logits: Of shape (tokens, vocabulary).
        labels: Of shape (tokens,); those that are `IGNORED` count for nothing.
    """
    total: Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        sums = [
            functional.cross_entropy(part.float(), of_part, ignore_index=IGNORED, reduction="sum")
            for part, of_part in zip(logits.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
        ]
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the softmax less 1 at each label; of operations that can be differentiated once more."""
        logits, labels = ctx.saved_tensors
        (gradient,) = gradients
        weight = (labels != IGNORED).unsqueeze(1) * gradient
        label = labels.clamp(min=0).unsqueeze(1)
        minus_one = torch.full_like(label, -1.0, dtype=torch.float32)
        found = torch.empty_like(logits)
        starts = range(0, len(logits), _AT_ONCE)
        parts = (tensor.split(_AT_ONCE) for tensor in (logits, label, minus_one, weight))
        for start, part, of_part, less, weighed in zip(starts, *parts, strict=True):
            error = part.float().softmax(dim=1).scatter_add(1, of_part, less)
            found[start : start + _AT_ONCE] = error * weighed
        return found, None
