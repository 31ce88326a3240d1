"""What every adapter method promises."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from autopeft.core.configuration import Adapter, Site
from autopeft.models.backbone import SiteShape

Placement = Mapping[Site, tuple[SiteShape, Adapter]]
"""The adapters of one method to attach: site → (what the backbone has there, the adapter)."""


@dataclass(frozen=True)
class Attached:
    """What a method put into a model.

    Attributes:
        parameters: The trainable parameters at each site, under names that are stable across runs.
        undo: Takes everything out again.
    """

    parameters: Mapping[Site, Mapping[str, nn.Parameter]]
    undo: Callable[[], None]


class Method(ABC):
    """An adapter family.

    Guarantees (checked for every method by `tests/methods/test_contract.py`):

    * `count` equals the number of parameters that `attach` makes trainable at the site;
    * right after `attach` the model computes what it computed before (prefix, which adds positions
      to attend to, changes it slightly: its values start near 0);
    * `undo` leaves the very module and parameter objects that were there before, bit-identical;
    * of its parameters' dimensions, exactly those in `size_dimensions` change with the adapter's size;
    * methods can be attached to one model one after another, wrapping ones first.
    """

    size_dimensions: Mapping[str, int] = MappingProxyType({})
    """Which dimension of a parameter is the adapter's size, by the names of the parameters that have it.

    What runs must not depend on the size: memory is a formula in it (`evaluation.memory.size_formula`).
    """

    @abstractmethod
    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the exact number of trainable parameters of an adapter at a site."""

    @abstractmethod
    def attach(self, model: nn.Module, placement: Placement) -> Attached:
        """Put adapters into a model in place. Weights are drawn from torch's global generator."""


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def undrawn_linears() -> Iterator[None]:
    """Leave the weights of linear layers that are made undrawn: whoever makes them fills every one himself.

    `nn.Linear` draws its weights when it is made, which for an adapter are then drawn again or set to 0: a
    third of what attaching took. Layers that other threads make are drawn as ever.
    """
    with _ONE_AT_A_TIME:
        draw, thread = nn.Linear.reset_parameters, threading.get_ident()

        def draw_elsewhere(linear: nn.Linear) -> None:
            if threading.get_ident() != thread:
                draw(linear)

        nn.Linear.reset_parameters = draw_elsewhere  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            nn.Linear.reset_parameters = draw  # type: ignore[method-assign]
