"""What every adapter method promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Site
from autopeft.models.site_shapes import SiteShape

Placement = Mapping[Site, tuple[SiteShape, Adapter]]
"""The adapters of one method to attach: site → (what the backbone has there, the adapter)."""


ORIGINALS = "autopeft_originals"
"""Attribute of a module with what stood in the place of what `swap` put there, by name."""

RATE = "autopeft_rate"
"""Attribute of a parameter that is trained at a multiple of the configuration's learning rate: the factor."""

Trainable = dict[Site | str, Mapping[str, Tensor]]
"""The tensors of the adapters at each site, under names that are stable across runs.

Those that require a gradient are trained; others, as the places of sparse numbers, are kept with them and
exported. What several sites share stands under a text, the name of their group.
"""


class Switchable(nn.Module):
    """A module of an adapter that `adapters_off` turns off."""

    is_on = True


class Method(ABC):
    """An adapter family.

    Guarantees (checked for every method by `tests/methods/test_contract.py`):

    * `count` equals the number of parameters that `attach` makes trainable at the site, and `count_shared`
      the number of those that sites share;
    * right after `attach` the model computes what it computed before, if it `starts_at_base`;
    * closing `undo` leaves the very module and parameter objects that were there before, bit-identical;
    * methods can be attached to one model one after another, wrapping ones first.
    """

    name: str
    """Its name in configurations: the one of its `MethodSpec`."""

    shares_state = False
    """Whether sites share trainable parameters."""

    @property
    def is_mergeable(self) -> bool:
        """Whether weights can take its adapters in; those of others add computation of their own."""
        return False

    @property
    def starts_at_base(self) -> bool:
        """Whether the model computes the same right after attaching."""
        return True

    @property
    def changes_weights(self) -> bool:
        """Whether attaching changes a layer's own weights, so that it is given a copy of the layer."""
        return False

    def obstacle(self, shape: SiteShape, adapter: Adapter, bits: int | None = None) -> str | None:
        """Say why an adapter cannot sit on a module; None if it can.

        Args:
            shape: The module.
            adapter: The adapter.
            bits: 4 or 8 where bitsandbytes packed the module's weights.
        """
        return None

    def rate(self, adapter: Adapter, name: str) -> float:
        """Return at which multiple of the configuration's learning rate a tensor of an adapter is trained."""
        return adapter.specification.rate

    def group_key(self, shape: SiteShape, adapter: Adapter) -> Hashable:
        """Return what tells groups of adapters apart, each of which shares its own parameters."""
        return ()

    def count_shared(self, placement: Placement) -> int:
        """Return the number of trainable parameters that sites share, beside what `count` says of each."""
        return 0

    @abstractmethod
    def count(self, shape: SiteShape, adapter: Adapter) -> int:
        """Return the exact number of trainable parameters of an adapter at a site."""

    @abstractmethod
    def attach(self, model: nn.Module, placement: Placement, undo: ExitStack) -> Trainable:
        """Put adapters into a model in place. Weights are drawn from torch's global generator.

        As they are put in, `undo` is given what takes them out again; the caller closes it, after errors too.
        """


def hang(host: nn.Module, name: str, module: nn.Module, undo: ExitStack) -> None:
    """Make an adapter's module a child of the one that it acts on, on its device and in its mode."""
    module.to(next(host.parameters()).device).train(host.training)
    host.add_module(name, module)
    undo.callback(delattr, host, name)


def swap(module: nn.Module, name: str, value: nn.Module | nn.Parameter, undo: ExitStack) -> None:
    """Put a module or a parameter in the place of the one that a module has under a name."""
    original = getattr(module, name)
    vars(module).setdefault(ORIGINALS, {})[name] = original
    undo.callback(vars(module).pop, ORIGINALS, None)
    undo.callback(setattr, module, name, original)
    setattr(module, name, value)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
