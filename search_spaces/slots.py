"""A slot: one choice a space makes, for one role in one block or group of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.suggest_trial import SuggestTrial

_OFF = "off"
Encoding = Literal["fixed", "conditional"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One role in one group of blocks: no adapter, or a method and its size.

    Attributes:
        name: What the names of its parameters begin with, as in "0-1.query".
        sites: The sites that get the same adapter.
        choices: The methods to choose from, by name.
    """

    name: str
    sites: tuple[Site, ...]
    choices: Mapping[str, MethodChoice]

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
        asked = {
            candidate: self._suggest_size(trial, choice)
            for candidate, choice in self.choices.items()
            if encoding == "fixed" or candidate == method
        }
        return asked.get(method)

    def encode(self, adapter: Adapter | None, encoding: Encoding) -> dict[str, Any]:
        """Return the parameters that `suggest` decodes to `adapter`.

        Raises:
            ValueError: The adapter is none of the slot's choices.
        """
        method, size = (_OFF, None) if adapter is None else (adapter.method, adapter.size)
        if adapter is not None and (
            method not in self.choices or adapter != self.choices[method].of_size(size or 1)
        ):
            raise ValueError(f"{adapter} is none of the choices for {self.name}.")
        parameters: dict[str, Any] = {f"{self.name}.method": method}
        for candidate, choice in self.choices.items():
            name = self._size_parameter(choice)
            if name is not None and (encoding == "fixed" or candidate == method):
                parameters[name] = size if candidate == method else choice.sizes[0]
        return parameters

    def largest(self, backbone: Backbone) -> Adapter:
        """Return the choice with the most trainable parameters."""
        return max(
            (choice.largest for choice in self.choices.values()),
            key=lambda adapter: sum(count_site(backbone, site, adapter) for site in self.sites),
        )

    def of(self, configuration: Configuration) -> Adapter | None:
        """Return what a configuration has in this slot.

        Raises:
            ValueError: The sites of the slot differ, or carry several adapters.
        """
        found = {configuration.adapters.get(site, ()) for site in self.sites}
        several = next(iter(found))
        if len(found) > 1 or len(several) > 1:
            raise ValueError(f"{self.name} takes one adapter, the same in all its blocks.")
        return several[0] if several else None

    def _suggest_size(self, trial: SuggestTrial, choice: MethodChoice) -> Adapter:
        name, sizes = self._size_parameter(choice), choice.sizes
        if name is None:
            return choice.smallest
        if isinstance(sizes, range):
            return choice.of_size(trial.suggest_int(name, sizes[0], sizes[-1], log=True))
        return choice.of_size(trial.suggest_categorical(name, sizes))

    def _size_parameter(self, choice: MethodChoice) -> str | None:
        """Return the name of the parameter of a method's size, or None where there is nothing to ask."""
        if isinstance(choice.sizes, range):
            return f"{self.name}.{choice.method}_size"
        if len(choice.sizes) < 2:
            return None
        return f"{self.name}.{choice.method}_{METHOD_SPECS[choice.method].size_name}".replace(" ", "_")


def placed(adapter: Adapter, slots: Iterable[Slot]) -> dict[Site, Adapter]:
    """Put an adapter into all slots that can take it."""
    return {site: adapter for slot in slots if adapter.method in slot.choices for site in slot.sites}
