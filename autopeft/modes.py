"""A model's mode, training or evaluation, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model in training or evaluation mode, and leave it in the one it had.

    All modules are taken to be in the model's own mode: to walk through them costs as much as an adapter.

    Args:
        model: The model.
        training: Whether it is to be in training mode.
    """
    before = model.training
    if before is not training:
        model.train(training)
    try:
        yield
    finally:
        if before is not training:
            model.train(before)
