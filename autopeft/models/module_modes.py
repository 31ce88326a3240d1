"""A model's modules and parameters in one quick walk, and its mode, training or evaluation, for a while.

torch's own walks are nested generators that name what they find: through a model of 200 modules they take a
millisecond, and a trial needs a dozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

_PLAIN = (nn.Module.train, PreTrainedModel.train)


def iter_modules(model: nn.Module) -> list[nn.Module]:
    """Return a model and all modules in it, each once, in an order that is the same for equal models."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [one for one in module._modules.values() if one is not None]
    return list(found)


def iter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return a model's parameters, tied ones once, in no order that means anything."""
    found = {
        id(one): one
        for module in iter_modules(model)
        for one in module._parameters.values()
        if one is not None
    }
    return list(found.values())


def set_mode(model: nn.Module, *, training: bool) -> None:
    """Do what `model.train(training)` does, for modules that override `train` after all others.

    It makes a difference where what such a module does to one that it holds is undone by another holder.
    """
    seen: set[nn.Module] = set()
    waiting, others = [model], []
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if _is_plain(module):
            module.__dict__["training"] = training
            waiting += [one for one in reversed(module._modules.values()) if one is not None]
        else:
            others.append(module)
    for module in others:
        module.train(training)  # it has something of its own to do, and perhaps for what it holds


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's mode is its attribute `training`, and nothing else."""
    kind = type(module)
    if kind.train not in _PLAIN or "train" in vars(module):
        return False
    if kind.__setattr__ is not nn.Module.__setattr__:  # scripted modules hand the attribute on
        return False
    return not (isinstance(module, PreTrainedModel) and module.use_kernels)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model in training or evaluation mode, and leave it in the one it had.

    All modules are taken to be in the model's own mode.

    Args:
        model: The model.
        training: Whether it is to be in training mode.
    """
    before = model.training
    if before is not training:
        set_mode(model, training=training)
    try:
        yield
    finally:
        if before is not training:
            set_mode(model, training=before)
