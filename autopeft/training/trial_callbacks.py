"""Callbacks that a user passes to `Training`: made anew for each trial, and part of a search's identity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback
from torch import nn

CallbackSource = Callback | Callable[[], Callback]
"""An instance, copied for each trial, or a function that makes one; a class without arguments is one."""


def check_sources(sources: object) -> tuple[CallbackSource, ...]:
    """Return what was passed as callbacks as a tuple; raise a ValueError where it is something else."""
    if (
        isinstance(sources, str)
        or not isinstance(sources, Sequence)
        or not all(isinstance(source, Callback) or callable(source) for source in sources)
    ):
        raise ValueError(
            "callbacks is a list of Lightning callbacks, or of functions that make one for each trial, got "
            f"{sources!r}."
        )
    return tuple(sources)


def new_callbacks(sources: Sequence[CallbackSource], module: nn.Module | None = None) -> list[Callback]:
    """Make the callbacks of one trial.

    Args:
        sources: Instances, which are copied, and functions, which are called and have to return a callback.
        module: What is trained: callbacks with a method `applies_to` that denies it are left out, as those
            that need LoRA layers; None for all.
    """
    made: list[Any] = [
        copy.deepcopy(source) if isinstance(source, Callback) else source() for source in sources
    ]
    for given in made:
        if not isinstance(given, Callback):
            raise ValueError(
                f"A function among the callbacks returned {given!r}, expected a lightning.pytorch.Callback."
            )
    return [
        callback
        for callback in made
        if module is None or not hasattr(callback, "applies_to") or callback.applies_to(module)
    ]


def describe_callback(callback: Callback) -> str:
    """Return a callback's class and public attributes, as in "LISA(active=(), count=2, ...)".

    Attributes whose text holds an address are described by their class.
    """
    settings = []
    for name, value in sorted(vars(callback).items()):
        if not name.startswith("_"):
            text = repr(value)
            settings.append(f"{name}={type(value).__qualname__ if ' at 0x' in text else text}")
    return f"{type(callback).__qualname__}({', '.join(settings)})"
