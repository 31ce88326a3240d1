"""Turn adapters off and on again, as for a reference model that shares the backbone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.methods.base import ORIGINALS, Switchable


@contextmanager
def adapters_off(model: nn.Module, kept: Iterable[str] = ()) -> Iterator[None]:
    """Let a model compute what its frozen backbone does, in a `with` block; its own head comes back too.

    For losses with a reference, as in preference optimisation (Rafailov et al., "Direct Preference
    Optimization", 2023): what was computed with adapters keeps its graph, and no weights are held twice.

    Args:
        model: The model that a task's `forward` is given.
        kept: Names of modules whose parameters stay those that are trained, as of a new head.
    """
    inside = tuple(f"{name}." for name in kept)
    with ExitStack() as back:
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                for parameter in cast(nn.Module, module).parameters():  # turned on, all would be trained
                    back.callback(parameter.requires_grad_, parameter.requires_grad)
                module.enable_adapters(False)
                back.callback(module.enable_adapters, True)
            elif isinstance(module, Switchable):
                module.is_on = False
                back.callback(setattr, module, "is_on", True)
            originals = {} if f"{path}.".startswith(inside) else vars(module).get(ORIGINALS, {})
            for name, original in originals.items():
                back.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, original)
        yield
