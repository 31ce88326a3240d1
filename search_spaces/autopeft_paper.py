"""The search space of the AutoPEFT paper: three global sizes, and each block on or off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import SearchSpace
from autopeft.search_spaces.baselines import Baseline, chosen_baselines
from autopeft.search_spaces.learning_rates import (
    LearningRate,
    checked_learning_rate,
    describe_learning_rate,
    encode_training,
    middle_learning_rate,
    suggest_learning_rate,
)
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.suggest_trial import SuggestTrial

_SITES: Mapping[str, str] = {"series": "ffn", "parallel": "ffn", "prefix": "attention"}
_HALVINGS = 10  # of the hidden width, itself included: the paper's k = 0 … 9


@dataclass(frozen=True, kw_only=True)
class AutoPEFTPaper(SearchSpace):
    """Series, parallel and prefix together, each with one global size; adapters on or off a block.

    Zhou et al., "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning", TACL
    2024. A size is the hidden width divided by 2^k for k = 0 … 9, or 0 (none): for a width of 768,
    that is 768, 384, …, 3, 1, 0. The paper fixes the learning rate; a range searches it too.

    Attributes:
        learning_rate: A number, or (lowest, highest) to search it on a log scale.

    Raises:
        ValueError: The learning rate is not valid.
    """

    learning_rate: LearningRate = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "learning_rate", checked_learning_rate(self.learning_rate))

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError where a block cannot carry one of the three methods."""
        for block in range(len(backbone.blocks)):
            for method, role in _SITES.items():
                obstacle = backbone.obstacle(backbone.shape(Site(block, role)), method)
                if obstacle is not None:
                    raise ValueError(
                        f"AutoPEFTPaper needs {method!r} on {block}.{role} of {backbone.name}, "
                        f"but {obstacle}; PerLayer can leave it out."
                    )

    def sizes(self, backbone: Backbone) -> tuple[int, ...]:
        """Return the sizes, rising from 0 to the hidden width."""
        hidden = backbone.shape(Site(0, "ffn")).out_features
        halvings = {hidden // 2**k for k in range(_HALVINGS)}
        return tuple(sorted(halvings | {0}))

    def _decode(self, sizes: Mapping[str, int], blocks: list[int], rate: float) -> Configuration:
        adapters: dict[Site, tuple[Adapter, ...]] = {}
        for block in blocks:
            for method, role in _SITES.items():
                if sizes[method]:
                    site = Site(block, role)
                    adapters[site] = (*adapters.get(site, ()), Adapter(method, sizes[method]))
        return Configuration(adapters, learning_rate=rate)

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask for three sizes and for each block; see `SearchSpace.suggest`."""
        ladder = self.sizes(backbone)
        sizes = {method: trial.suggest_categorical(f"{method}.size", ladder) for method in _SITES}
        blocks = [
            block
            for block in range(len(backbone.blocks))
            if trial.suggest_categorical(f"{block}.on", (True, False))
        ]
        rate = suggest_learning_rate(trial, self.learning_rate)
        return self._decode(sizes, blocks, rate)

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of a configuration; see `SearchSpace.encode`."""
        ladder = self.sizes(backbone)
        sizes = dict.fromkeys(_SITES, 0)
        sizes |= {adapter.method: adapter.size or 0 for _, adapter in configuration}
        blocks = sorted({site.block for site in configuration.adapters})
        rate = configuration.learning_rate
        present = set(blocks) <= set(range(len(backbone.blocks)))
        known = sizes.keys() == _SITES.keys() and set(sizes.values()) <= set(ladder)
        if not present or not known or self._decode(sizes, blocks, rate) != configuration:
            raise ValueError(f"{configuration!r} does not have one global size each of {', '.join(_SITES)}.")
        return {
            **{f"{method}.size": size for method, size in sizes.items()},
            **{f"{block}.on": block in blocks for block in range(len(backbone.blocks))},
            **encode_training(configuration, self.learning_rate),
        }

    def choices(self, backbone: Backbone) -> dict[Site, dict[str, MethodChoice]]:
        """Return the three methods at the two sublayers of every block; see `SearchSpace.choices`."""
        sizes = self.sizes(backbone)[1:]
        found: dict[Site, dict[str, MethodChoice]] = {}
        for block in range(len(backbone.blocks)):
            for method, role in _SITES.items():
                found.setdefault(Site(block, role), {})[method] = MethodChoice(method=method, sizes=sizes)
        return dict(sorted(found.items()))

    def baselines(self, backbone: Backbone, trials: int | None = None) -> tuple[Baseline, ...]:
        """Return the head alone and each method alone, everywhere, at a middle size."""
        rate = middle_learning_rate(self.learning_rate)
        blocks = list(range(len(backbone.blocks)))
        ladder = self.sizes(backbone)
        found = [Baseline(name="head alone", configuration=Configuration(learning_rate=rate))]
        for method in _SITES:
            sizes = dict.fromkeys(_SITES, 0) | {method: ladder[len(ladder) // 2]}
            found.append(
                Baseline(
                    name=f"{method}({sizes[method]}) everywhere",
                    configuration=self._decode(sizes, blocks, rate),
                )
            )
        return chosen_baselines(found, trials)

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and all three methods at the hidden width in every block."""
        rate = middle_learning_rate(self.learning_rate)
        sizes = dict.fromkeys(_SITES, self.sizes(backbone)[-1])
        blocks = list(range(len(backbone.blocks)))
        return Configuration(learning_rate=rate), self._decode(sizes, blocks, rate)

    def count(self, backbone: Backbone) -> int:
        """Return the number of different configurations: those without any adapter count once."""
        sizes: int = len(self.sizes(backbone)) ** len(_SITES)
        patterns: int = 2 ** len(backbone.blocks) - 1
        return (sizes - 1) * patterns + 1

    def describe(self, backbone: Backbone) -> str:
        """Say what is searched; see `SearchSpace.describe`."""
        ladder = "|".join(str(size) for size in self.sizes(backbone))
        low, high = (count_parameters(backbone, end) for end in self.extremes(backbone))
        return "\n".join(
            [
                f"AutoPEFTPaper: global sizes of series, parallel and prefix, each of {ladder}; "
                f"{len(backbone.blocks)} blocks on or off",
                f"learning rate {describe_learning_rate(self.learning_rate)}",
                f"{self.count(backbone):.3g} configurations, {low:,} to {high:,} trainable parameters",
            ]
        )
