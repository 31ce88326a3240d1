"""What sites may carry: a method with its sizes, and a slot of sites that choose together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS, OptionValue, PeftSpec
from autopeft.methods import METHODS, count_site, obstacle
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.learning_rates import log_place
from autopeft.search_spaces.suggest_trial import SuggestTrial

_OFF = "off"
Encoding = Literal["fixed", "conditional"]


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """A method that a site may carry."""

    method: str
    sizes: Sequence[int] = ()  # the sizes there are, rising; empty for a method without a size
    options: Mapping[str, OptionValue] = field(default_factory=dict)  # options of its adapters

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters of all sizes, rising."""
        return tuple(self.of_size(size) for size in self.sizes or (1,))

    @property
    def three_adapters(self) -> tuple[Adapter, Adapter, Adapter]:
        """The adapters of the smallest, the middle and the largest size."""
        adapters = self.adapters
        return adapters[0], adapters[len(adapters) // 2], adapters[-1]

    @property
    def smallest(self) -> Adapter:
        """The adapter of the smallest size."""
        return self.of_size(1)

    @property
    def largest(self) -> Adapter:
        """The adapter of the largest size."""
        return self.of_size(self.sizes[-1] if self.sizes else 1)

    def __str__(self) -> str:
        return f"{self.method} {'|'.join(map(str, self.sizes))}".rstrip()

    def of_size(self, size: int) -> Adapter:
        """Return the adapter of a size, or of the nearest there is on a log scale."""
        if not self.sizes:
            return Adapter(self.method, None, self.options)
        size = min(max(size, self.sizes[0]), self.sizes[-1])
        if size not in self.sizes:
            size = min(self.sizes, key=lambda known: abs(math.log(known / size)))
        return Adapter(self.method, size, self.options)

    def at(self, place: float) -> Adapter:
        """Return the adapter of the size at a place, as `place` has it."""
        low, high = (self.sizes[0], self.sizes[-1]) if self.sizes else (1, 1)
        return self.of_size(round(low * (high / low) ** (2 * place - 1)))

    def on(self, backbone: Backbone, sites: Sequence[Site]) -> MethodChoice | None:
        """Return it with the sizes that all of some sites can take, or None where there is none.

        Above what a layer has room for, some of peft's families make the same adapter of every size, as LoKr
        and PiSSA do: of sizes with equal counts the smallest is taken.
        """
        fitting = [
            adapter
            for adapter in self.adapters
            if not any(obstacle(backbone, site, adapter) for site in sites)
        ]
        # What sites share is not in the counts.
        if isinstance(METHOD_SPECS[self.method], PeftSpec) and not METHODS[self.method].shares_state:
            of_counts: dict[tuple[int, ...], Adapter] = {}
            for adapter in fitting:
                of_counts.setdefault(tuple(count_site(backbone, site, adapter) for site in sites), adapter)
            fitting = list(of_counts.values())
        if len(fitting) == len(self.adapters):
            return self
        return replace(self, sizes=[adapter.size or 1 for adapter in fitting]) if fitting else None

    def place(self, adapter: Adapter) -> float:
        """Return where an adapter's size lies on a log scale, from 0.5 (smallest) to 1 (largest).

        No adapter is 0; having one counts as much as the whole range of its sizes.
        """
        if not self.sizes:
            return 0.5
        low, high = self.sizes[0], self.sizes[-1]
        return 0.5 + 0.5 * log_place(min(max(adapter.size or low, low), high), low, high)


Choices = Mapping[Site, Mapping[str, MethodChoice]]
"""The methods that each site may carry, by name."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One role in one block or group of blocks: no adapter, or a method and its size."""

    name: str  # what the names of its parameters begin with, as in "0-1.query"
    sites: tuple[Site, ...]  # the sites that get the same adapter
    choices: Mapping[str, MethodChoice]  # the methods to choose from, by name

    @property
    def count(self) -> int:
        """Number of choices, having no adapter included."""
        return 1 + sum(max(1, len(choice.sizes)) for choice in self.choices.values())

    def suggest(self, trial: SuggestTrial, encoding: Encoding) -> Adapter | None:
        """Ask for the method and its size.

        The "fixed" encoding asks for every method's size whether chosen or not, which gives samplers
        that model parameters jointly one space of constant shape; "conditional" asks for the size of
        the chosen method alone.
        """
        method = trial.suggest_categorical(f"{self.name}.method", (_OFF, *self.choices))
        sizes = {
            candidate: self._suggest_size(trial, choice)
            for candidate, choice in self.choices.items()
            if encoding == "fixed" or candidate == method
        }
        return self.choices[method].of_size(sizes[method]) if method in sizes else None

    def encode(self, configuration: Configuration) -> dict[str, Any]:
        """Return the parameters that `suggest` decodes to what a configuration has at the first site."""
        several = configuration.adapters.get(self.sites[0], ())
        if not several or several[0].method not in self.choices:
            return {f"{self.name}.method": _OFF}
        method, size = several[0].method, several[0].size
        parameter = self._size_parameters[method]
        return {f"{self.name}.method": method} | ({} if parameter is None else {parameter: size})

    def own_parameters(self, backbone: Backbone, adapter: Adapter) -> int:
        """Return the trainable parameters of an adapter on all sites, without those that sites share."""
        return sum(count_site(backbone, site, adapter) for site in self.sites)

    def _suggest_size(self, trial: SuggestTrial, choice: MethodChoice) -> int:
        name, sizes = self._size_parameters[choice.method], choice.sizes
        if name is None:
            return 1  # which `of_size` makes the only one
        if isinstance(sizes, range):
            return trial.suggest_int(name, sizes[0], sizes[-1], log=True)
        return int(trial.suggest_categorical(name, sizes))

    @cached_property
    def _size_parameters(self) -> Mapping[str, str | None]:
        return {method: self._size_parameter(choice) for method, choice in self.choices.items()}

    def _size_parameter(self, choice: MethodChoice) -> str | None:
        """Return the name of the parameter of a method's size, or None where there is nothing to ask."""
        if isinstance(choice.sizes, range):
            return f"{self.name}.{choice.method}_size"
        if len(choice.sizes) < 2:
            return None
        return f"{self.name}.{choice.method}_{METHOD_SPECS[choice.method].size_name}".replace(" ", "_")


def placed(adapter: Adapter, slots: Iterable[Slot]) -> dict[Site, Adapter]:
    """Put an adapter into all slots that can take it."""
    return {
        site: adapter
        for slot in slots
        if adapter.method in slot.choices and adapter.size in (slot.choices[adapter.method].sizes or (None,))
        for site in slot.sites
    }


def most_parameters(slots: Sequence[Slot], backbone: Backbone) -> dict[Site, Adapter]:
    """Return adapters for all slots that have the most trainable parameters together.

    What the adapters of a group share counts once, so that one of them in the slot where most is gained by it
    will do: which slots those are is an assignment problem. All other slots have what is largest alone.
    """
    chosen: list[Adapter] = []
    groups: dict[Hashable, dict[int, tuple[int, Adapter]]] = {}
    for column, slot in enumerate(slots):
        own = partial(slot.own_parameters, backbone)
        chosen.append(max((choice.largest for choice in slot.choices.values()), key=own))
        shape = backbone.shape(slot.sites[0])
        for choice in slot.choices.values():
            method = METHODS[choice.method]
            for adapter in choice.adapters if method.shares_state else ():
                shared = method.count_shared({shape.site: (shape, adapter)})
                gain = shared + own(adapter) - own(chosen[column])
                group = groups.setdefault((choice.method, method.group_key(shape, adapter)), {})
                if gain > group.get(column, (0, adapter))[0]:
                    group[column] = gain, adapter
    gains = np.zeros((len(groups), len(slots)))
    for row, group in enumerate(groups.values()):
        for column, (gain, _) in group.items():
            gains[row, column] = gain
    several = list(groups.values())
    for row, column in zip(*linear_sum_assignment(gains, maximize=True), strict=True):
        if column in several[row]:
            chosen[column] = several[row][column][1]
    return {site: adapter for slot, adapter in zip(slots, chosen, strict=True) for site in slot.sites}
