"""A training batch in parts, whose gradients add up to those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autopeft.tasks import Batch, Task

TrainingBatch = Batch | list[Batch]
"""The rows of an optimizer step: one batch, or several that run through the model one after another."""


def with_shares(task: Task, batch: TrainingBatch) -> list[tuple[float, Batch]]:
    """Return a batch's parts, each with its share of the batch's mean loss; those of none are left out."""
    if not isinstance(batch, list):
        return [(1.0, batch)]
    weights = torch.stack([task.weight(part).double() for part in batch])
    shares = (weights / weights.sum()).tolist()
    return [(share, part) for share, part in zip(shares, batch, strict=True) if share != 0]


def loss_in_parts(parts: Sequence[tuple[float, Batch]], loss_of: Callable[[Batch], Tensor]) -> Tensor:
    """Return the mean loss over the parts of a batch, with the gradient of the last part alone.

    The gradients of the others are added to the parameters': with those of a backward pass from what is
    returned, they are the gradients of the whole batch. Without gradients there is the loss alone.

    Args:
        parts: As `with_shares` returns them.
        loss_of: Returns the mean loss of a part.
    """
    *earlier, (last_share, last) = parts
    before: Tensor | float = 0.0
    for share, part in earlier:
        loss = share * loss_of(part)
        before = before + loss.detach()
        if loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):  # it is for forward passes
                loss.backward()
    return before + last_share * loss_of(last)
