"""Uniform: one method and one size everywhere, which is what people tune today."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline
from autopeft.search_spaces.method_choice import placed
from autopeft.search_spaces.method_space import MethodSpace
from autopeft.search_spaces.suggest_trial import SuggestTrial


@dataclass(frozen=True, kw_only=True)
class Uniform(MethodSpace):
    """One method, one size, on every site of the chosen roles that can take it: a global rank sweep.

    The arguments, and the errors raised, are those of `MethodSpace`.
    """

    methods: Sequence[str] = ("lora",)

    def adapters(self) -> dict[str, Adapter]:
        """Return the choices by name, as in "lora(8)"."""
        several = (adapter for method in self.methods for adapter in self.choice_of(method).adapters)
        return {str(adapter): adapter for adapter in several}

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        """Ask for the method and its size; see `SearchSpace.suggest_adapters`."""
        choice = self.choice_of(trial.suggest_categorical("method", tuple(self.methods)))
        size = trial.suggest_categorical(f"{choice.method}.size", choice.sizes) if choice.sizes else 1
        return placed(choice.of_size(size), self.slots(backbone))

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the method and its size; see `SearchSpace.encode_adapters`."""
        known: dict[str, Any] = {}
        for _, adapter in configuration:
            known |= {"method": adapter.method, f"{adapter.method}.size": adapter.size}
        return known

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield each method's smallest size, then their middle and their largest sizes."""
        several = [self.choice_of(method).three_adapters for method in self.methods]
        for adapter in chain(*zip(*several, strict=True)):
            yield Baseline(name=f"{adapter} everywhere", configuration=self._everywhere(adapter, backbone))

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the points with the fewest and the most trainable parameters."""
        points = [self._everywhere(adapter, backbone) for adapter in self.adapters().values()]
        ranked = sorted(points, key=lambda point: count_parameters(backbone, point))
        return ranked[0], ranked[-1]

    def count(self, backbone: Backbone) -> int:
        """Return the number of (method, size) pairs."""
        return len(self.adapters())

    def summary(self, backbone: Backbone) -> str:
        """Say what is chosen from; see `SearchSpace.summary`."""
        return f"one of {', '.join(self.adapters())} everywhere"

    def _everywhere(self, adapter: Adapter, backbone: Backbone) -> Configuration:
        return self.point(placed(adapter, self.slots(backbone)))
