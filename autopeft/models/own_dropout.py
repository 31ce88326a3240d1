"""The dropout that a model itself has, which some tasks train without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def own_dropout(model: nn.Module, *, is_on: bool) -> Iterator[None]:
    """Set every rate of a model's dropout to 0 in a `with` block, unless it is on.

    Enter it before adapters are attached: theirs stay. Evaluation mode would do as much, but activations are
    not computed again in it. Configs are changed too, which some models read in their forward pass, as Falcon
    does; rates are put back wherever they were.
    """
    holders = [
        holder
        for module in model.modules()
        for holder in (module, getattr(module, "config", None))
        if holder is not None and not is_on
    ]
    rates = [
        (holder, name, value)
        for holder in holders
        for name, value in vars(holder).items()
        if ("drop" in name or (name == "p" and isinstance(holder, nn.Dropout))) and isinstance(value, float)
    ]
    try:
        for holder, name, _ in rates:
            setattr(holder, name, 0.0)
        yield
    finally:
        for holder, name, rate in rates:
            setattr(holder, name, rate)
