"""Uniform: one method and one size, everywhere or where people place it, which is what they tune today."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import checked_names
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline
from autopeft.search_spaces.method_choice import Slot, placed
from autopeft.search_spaces.method_space import MethodSpace, in_mlp, in_top_half
from autopeft.search_spaces.suggest_trial import SuggestTrial

_QUERY_AND_VALUE = ("query", "value", "qkv", "cross_query", "cross_value")
PLACES: Mapping[str, Callable[[Site, Backbone], bool]] = {
    "all": lambda site, backbone: True,
    "query and value": lambda site, backbone: site.role in _QUERY_AND_VALUE,
    "top half": lambda site, backbone: in_top_half(site.place, backbone),
    "MLP": lambda site, backbone: in_mlp(site),
}
"""Where people place adapters, the most usual first, and whether a site is there."""


@dataclass(frozen=True, kw_only=True)
class Uniform(MethodSpace):
    """One method, one size, on every site of the chosen roles that can take it: a global rank sweep.

    The other arguments, and the errors raised, are those of `MethodSpace`.

    Attributes:
        places: Where to place it, to choose from: "all", "query and value" (their fused layer, where a model
            has one), "top half" (of each stack's blocks) and "MLP". A place where a backbone has no site for
            a method, or the same as another place, is left out.
    """

    methods: Sequence[str] = ("lora",)
    places: Sequence[str] = field(default=("all",), metadata={"unset": ("all",)})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "places", checked_names("place", self.places, PLACES))

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a method without a site in the places; see `MethodSpace.validate`."""
        super().validate(backbone)
        for method in self.methods:
            if not self.places_of(method, backbone):
                raise ValueError(
                    f"{method!r} has no site in {', '.join(self.places)} of {backbone.name}: add the place "
                    "'all'."
                )

    def places_of(self, method: str, backbone: Backbone) -> dict[str, list[Slot]]:
        """Return the places of a backbone where a method can sit, with their slots; the same slots once."""
        slots = [slot for slot in self.slots(backbone) if method in slot.choices]
        found: dict[str, list[Slot]] = {}
        for place in self.places:
            there = [slot for slot in slots if all(PLACES[place](site, backbone) for site in slot.sites)]
            if there and there not in found.values():
                found[place] = there
        return found

    def adapters(self) -> dict[str, Adapter]:
        """Return the choices by name, as in "lora(8)"."""
        several = (adapter for method in self.methods for adapter in self.choice_of(method).adapters)
        return {str(adapter): adapter for adapter in several}

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        """Ask for the method, its size and, where there are several, its place; see `SearchSpace`."""
        choice = self.choice_of(trial.suggest_categorical("method", tuple(self.methods)))
        size = trial.suggest_categorical(f"{choice.method}.size", choice.sizes) if choice.sizes else 1
        places = self.places_of(choice.method, backbone)
        place, *others = places
        if others:
            place = trial.suggest_categorical(f"{choice.method}.place", tuple(places))
        return placed(choice.of_size(size), places[place])

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return method, size and the nearest place; see `SearchSpace.encode_adapters`."""
        known: dict[str, Any] = {}
        for _, adapter in configuration:
            known |= {"method": adapter.method, f"{adapter.method}.size": adapter.size}
        sites = configuration.adapters.keys()
        for method in self.methods:
            places = {
                place: {site for slot in slots for site in slot.sites}
                for place, slots in self.places_of(method, backbone).items()
            }
            known[f"{method}.place"] = min(places, key=lambda place: len(places[place] ^ sites))
        return known

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield each method's smallest size at its first place, then larger ones and further places."""
        turns = [
            (step + number, adapter, place)
            for method in self.methods
            for step, adapter in enumerate(self.choice_of(method).three_adapters)
            for number, place in enumerate(self.places_of(method, backbone))
        ]
        for _, adapter, place in sorted(turns, key=itemgetter(0)):
            point = self._placed(adapter, place, backbone)
            yield Baseline(name=self.name_of(point, backbone), configuration=point)

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the points with the fewest and the most trainable parameters."""
        points = [
            self._placed(adapter, place, backbone)
            for adapter in self.adapters().values()
            for place in self.places_of(adapter.method, backbone)
        ]
        ranked = sorted(points, key=lambda point: count_parameters(backbone, point))
        return ranked[0], ranked[-1]

    def count(self, backbone: Backbone) -> int:
        """Return the number of (method, size, place)."""
        return sum(len(self.places_of(adapter.method, backbone)) for adapter in self.adapters().values())

    def summary(self, backbone: Backbone) -> str:
        """Say what is chosen from; see `SearchSpace.summary`."""
        present = {place for method in self.methods for place in self.places_of(method, backbone)}
        where = ", ".join(_where(place) for place in self.places if place in present)
        return f"one of {', '.join(self.adapters())} {where}"

    def name_of(self, configuration: Configuration, backbone: Backbone) -> str:
        """Return what a point has and where, as in "lora(8) everywhere"."""
        _, adapter = next(iter(configuration))
        place = self.encode_adapters(configuration, backbone)[f"{adapter.method}.place"]
        return f"{adapter} {_where(place)}"

    def _placed(self, adapter: Adapter, place: str, backbone: Backbone) -> Configuration:
        return self.point(placed(adapter, self.places_of(adapter.method, backbone)[place]))


def _where(place: str) -> str:
    return "everywhere" if place == "all" else f"on {place}"
