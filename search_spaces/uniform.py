"""Uniform: one method and one size everywhere, which is what people tune today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import (
    Baseline,
    LearningRate,
    SearchSpace,
    SuggestTrial,
    describe_learning_rate,
    encode_learning_rate,
    middle_learning_rate,
    suggest_learning_rate,
)
from autopeft.search_spaces.per_layer import PerLayer


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

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a method no role can take."""
        self._per_layer().validate(backbone)

    def adapters(self) -> dict[str, Adapter]:
        """Return the choices by name, as in "lora(8)"."""
        space = self._per_layer()
        return {str(one): one for method in self.methods for one in space.adapters_of(method)}

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
        """Ask for the adapter and the learning rate; see `SearchSpace.suggest`."""
        choices = self.adapters()
        method = trial.suggest_categorical("method", tuple(self.methods))
        several = [adapter for adapter in choices.values() if adapter.method == method]
        index = trial.suggest_int(f"{method}.size", 0, len(several) - 1)
        rate = suggest_learning_rate(trial, self.learning_rate)
        return self.everywhere(several[index], backbone, rate)

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of a configuration; see `SearchSpace.encode`."""
        rate = configuration.learning_rate
        for adapter in self.adapters().values():
            if self.everywhere(adapter, backbone, rate) == configuration:
                several = [one for one in self.adapters().values() if one.method == adapter.method]
                return {
                    "method": adapter.method,
                    f"{adapter.method}.size": several.index(adapter),
                    **encode_learning_rate(rate, self.learning_rate),
                }
        raise ValueError(f"{configuration!r} is not one of {', '.join(self.adapters())} everywhere.")

    def baselines(self, backbone: Backbone) -> tuple[Baseline, ...]:
        """Return each method's smallest, middle and largest size."""
        space = self._per_layer()
        rate = middle_learning_rate(self.learning_rate)
        chosen: dict[Adapter, None] = {}
        for method in self.methods:
            sizes = space.adapters_of(method)
            chosen |= dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        return tuple(
            Baseline(name=f"{one} everywhere", configuration=self.everywhere(one, backbone, rate))
            for one in chosen
        )

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the points with the fewest and the most trainable parameters."""
        rate = middle_learning_rate(self.learning_rate)
        points = [self.everywhere(one, backbone, rate) for one in self.adapters().values()]
        ranked = sorted(points, key=lambda point: count_parameters(backbone, point))
        return ranked[0], ranked[-1]

    def count(self, backbone: Backbone) -> int:
        """Return the number of (method, size) pairs."""
        return len(self.adapters())

    def describe(self, backbone: Backbone) -> str:
        """Say what is chosen from; see `SearchSpace.describe`."""
        low, high = (count_parameters(backbone, one) for one in self.extremes(backbone))
        return "\n".join(
            [
                f"Uniform: one of {', '.join(self.adapters())} everywhere",
                f"learning rate {describe_learning_rate(self.learning_rate)}",
                f"{self.count(backbone)} configurations, {low:,} to {high:,} trainable parameters",
            ]
        )
