"""Uniform: one method and one size everywhere, which is what people tune today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import SearchSpace
from autopeft.search_spaces.baselines import Baseline, chosen_baselines
from autopeft.search_spaces.learning_rates import (
    LearningRate,
    describe_learning_rate,
    encode_training,
    middle_learning_rate,
    suggest_learning_rate,
)
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.suggest_trial import SuggestTrial


@dataclass(frozen=True, kw_only=True)
class Uniform(SearchSpace):
    """One method, one size, on every site of the chosen roles: a global rank sweep.

    Attributes:
        methods: The methods to choose from.
        ranks: (smallest, largest) rank of LoRA; powers of two between them are searched.
        widths: (smallest, largest) bottleneck width of series and parallel adapters.
        prefix_lengths: (smallest, largest) prefix length.
        roles: Roles that carry the adapter; None for all that the method can sit on.
        learning_rate: A number, or (lowest, highest) to search it on a log scale.
        options: Options fixed for a method, as in `{"lora": {"alpha": 16}}`.

    Raises:
        ValueError: A method, role, option or bound is not valid.
    """

    methods: Sequence[str] = ("lora",)
    ranks: tuple[int, int] = (1, 64)
    widths: tuple[int, int] = (1, 64)
    prefix_lengths: tuple[int, int] = (1, 32)
    roles: Sequence[str] | None = None
    learning_rate: LearningRate = (3e-4, 1e-2)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = self._per_layer()
        for name in ("methods", "roles", "learning_rate"):
            object.__setattr__(self, name, getattr(checked, name))

    def _per_layer(self) -> PerLayer:
        """Return the per-layer space whose diagonal this is; it checks and fills the fields."""
        return PerLayer(
            methods=self.methods,
            ranks=self.ranks,
            widths=self.widths,
            prefix_lengths=self.prefix_lengths,
            roles=self.roles,
            learning_rate=self.learning_rate,
            options=self.options,
        )

    def _by_method(self) -> dict[str, MethodChoice]:
        space = self._per_layer()
        return {method: space.choice_of(method) for method in self.methods}

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a method no role can take."""
        self._per_layer().validate(backbone)

    def adapters(self) -> dict[str, Adapter]:
        """Return the choices by name, as in "lora(8)"."""
        several = (adapter for choice in self._by_method().values() for adapter in choice.adapters)
        return {str(adapter): adapter for adapter in several}

    def everywhere(self, adapter: Adapter, backbone: Backbone, rate: float) -> Configuration:
        """Put one adapter on every site of the chosen roles that can take it."""
        wanted = backbone.roles if self.roles is None else self.roles
        sites: dict[Site, Adapter] = {
            site: adapter
            for site, shape in backbone.sites.items()
            if site.role in wanted and not backbone.obstacle(shape, adapter.method)
        }
        return Configuration(sites, learning_rate=rate)

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask for the method, its size and the learning rate; see `SearchSpace.suggest`."""
        choice = self._by_method()[trial.suggest_categorical("method", tuple(self.methods))]
        size = trial.suggest_categorical(f"{choice.method}.size", choice.sizes) if choice.sizes else 1
        rate = suggest_learning_rate(trial, self.learning_rate)
        return self.everywhere(choice.of_size(size), backbone, rate)

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of a configuration; see `SearchSpace.encode`."""
        rate = encode_training(configuration, self.learning_rate)
        for adapter in self.adapters().values():
            if self.everywhere(adapter, backbone, configuration.learning_rate) == configuration:
                size = {} if adapter.size is None else {f"{adapter.method}.size": adapter.size}
                return {"method": adapter.method, **size, **rate}
        raise ValueError(f"{configuration!r} is not one of {', '.join(self.adapters())} everywhere.")

    def choices(self, backbone: Backbone) -> dict[Site, Mapping[str, MethodChoice]]:
        """Return the methods that each site of the chosen roles can take; see `SearchSpace.choices`."""
        return self._per_layer().choices(backbone)

    def baselines(self, backbone: Backbone, trials: int | None = None) -> tuple[Baseline, ...]:
        """Return each method's smallest size, then their middle and their largest sizes."""
        rate = middle_learning_rate(self.learning_rate)
        several = [choice.adapters for choice in self._by_method().values()]
        chosen = [
            *(adapters[0] for adapters in several),
            *(adapters[len(adapters) // 2] for adapters in several),
            *(adapters[-1] for adapters in several),
        ]
        found = [
            Baseline(name=f"{adapter} everywhere", configuration=self.everywhere(adapter, backbone, rate))
            for adapter in dict.fromkeys(chosen)
        ]
        return chosen_baselines(found, trials)

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the points with the fewest and the most trainable parameters."""
        rate = middle_learning_rate(self.learning_rate)
        points = [self.everywhere(adapter, backbone, rate) for adapter in self.adapters().values()]
        ranked = sorted(points, key=lambda point: count_parameters(backbone, point))
        return ranked[0], ranked[-1]

    def count(self, backbone: Backbone) -> int:
        """Return the number of (method, size) pairs."""
        return len(self.adapters())

    def describe(self, backbone: Backbone) -> str:
        """Say what is chosen from; see `SearchSpace.describe`."""
        low, high = (count_parameters(backbone, end) for end in self.extremes(backbone))
        return "\n".join(
            [
                f"Uniform: one of {', '.join(self.adapters())} everywhere",
                f"learning rate {describe_learning_rate(self.learning_rate)}",
                f"{self.count(backbone)} configurations, {low:,} to {high:,} trainable parameters",
            ]
        )
