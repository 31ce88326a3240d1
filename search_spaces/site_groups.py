"""A slot: one choice a per-layer space makes, for one role in one group of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.suggest_trial import SuggestTrial

OFF = "off"
Encoding = Literal["fixed", "conditional"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One role in one group of blocks: no adapter, or a method and its size.

    Attributes:
        group: Name of the group of blocks, as in "0-1".
        sites: The sites that get the same adapter.
        choices: The methods to choose from, by name.
    """

    group: str
    sites: tuple[Site, ...]
    choices: Mapping[str, MethodChoice]

    @cached_property
    def name(self) -> str:
        """What the names of the slot's parameters begin with, as in "0-1.query"."""
        return f"{self.group}.{self.sites[0].role}"

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
        method = trial.suggest_categorical(f"{self.name}.method", (OFF, *self.choices))
        chosen: Adapter | None = None
        for candidate, choice in self.choices.items():
            size = choice.sizes[0] if choice.sizes else 1
            if len(choice.sizes) > 1 and (encoding == "fixed" or candidate == method):
                size = trial.suggest_categorical(f"{self.name}.{_size_name(candidate)}", choice.sizes)
            if candidate == method:
                chosen = choice.of_size(size)
        return chosen

    def encode(self, adapter: Adapter | None, encoding: Encoding) -> dict[str, Any]:
        """Return the parameters that `suggest` decodes to `adapter`.

        Raises:
            ValueError: The adapter is none of the slot's choices.
        """
        parameters: dict[str, Any] = {
            f"{self.name}.{_size_name(candidate)}": choice.sizes[0]
            for candidate, choice in self.choices.items()
            if len(choice.sizes) > 1 and encoding == "fixed"
        }
        if adapter is None:
            return {f"{self.name}.method": OFF, **parameters}
        chosen = self.choices.get(adapter.method)
        if chosen is None or adapter != chosen.of_size(adapter.size or 1):
            raise ValueError(f"{adapter} is none of the choices for {self.name}.")
        parameters[f"{self.name}.method"] = adapter.method
        if len(chosen.sizes) > 1:
            parameters[f"{self.name}.{_size_name(adapter.method)}"] = adapter.size
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


@cache
def _size_name(method: str) -> str:
    size_name = METHOD_SPECS[method].size_name
    assert size_name is not None
    return f"{method}_{size_name.replace(' ', '_')}"
