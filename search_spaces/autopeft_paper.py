"""The search space of the AutoPEFT paper: three global sizes, and each block on or off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autopeft.core.adapter import Place, place_name
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline, SearchSpace
from autopeft.search_spaces.learning_rates import LearningRate
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.suggest_trial import SuggestTrial

_ROLES: Mapping[str, str] = {"series": "ffn", "parallel": "ffn", "prefix": "attention"}
"""Where each method sits."""
_HALVINGS = 10  # of the hidden width, itself included: the paper's k = 0 … 9


@dataclass(frozen=True, kw_only=True)
class AutoPEFTPaper(SearchSpace):
    """Series, parallel and prefix together, each with one global size; adapters on or off a block.

    Zhou et al., "AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning", TACL
    2024. A size is the hidden width divided by 2^k for k = 0 … 9, or 0 (none): for a width of 768,
    that is 768, 384, …, 3, 1, 0. The paper fixes the learning rate; a range searches it too.
    """

    learning_rate: LearningRate | None = 1e-4

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError where a block cannot carry one of the three methods."""
        for stack, block in backbone.places:
            for method, role in _ROLES.items():
                site = Site(block, role, stack)
                obstacle = backbone.obstacle(backbone.shape(site), method)
                if obstacle is not None:
                    raise ValueError(
                        f"AutoPEFTPaper needs {method!r} on {site} of {backbone.name}, "
                        f"but {obstacle}; PerLayer can leave it out."
                    )
        self.check_allocations(backbone)

    def sizes(self, backbone: Backbone) -> tuple[int, ...]:
        """Return the sizes, rising from 0 to the hidden width."""
        hidden = backbone.shape(Site(0, "ffn", backbone.places[0][0])).out_features
        return tuple(sorted({0, *(hidden // 2**halvings for halvings in range(_HALVINGS))}))

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, tuple[Adapter, ...]]:
        """Ask for three sizes and for each block; see `SearchSpace.suggest_adapters`."""
        ladder = self.sizes(backbone)
        sizes = {method: trial.suggest_categorical(f"{method}.size", ladder) for method in _ROLES}
        on = [place for place in backbone.places if trial.suggest_categorical(_switch(place), (True, False))]
        return _adapters(sizes, on)

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the sizes and the blocks that are on; see `SearchSpace.encode_adapters`."""
        sizes = {f"{adapter.method}.size": adapter.size for _, adapter in configuration}
        on = {site.place for site in configuration.adapters}
        return sizes | {_switch(place): place in on for place in backbone.places}

    def choices(self, backbone: Backbone) -> dict[Site, dict[str, MethodChoice]]:
        """Return the three methods at the two sublayers of every block; see `SearchSpace.choices`."""
        sizes = self.sizes(backbone)[1:]
        found: dict[Site, dict[str, MethodChoice]] = {}
        for stack, block in backbone.places:
            for method, role in _ROLES.items():
                choice = MethodChoice(method=method, sizes=sizes)
                found.setdefault(Site(block, role, stack), {})[method] = choice
        return dict(sorted(found.items()))

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield the head alone and each method alone, everywhere, at a middle size."""
        ladder = self.sizes(backbone)
        size = ladder[len(ladder) // 2]
        yield Baseline(name="head alone", configuration=self.point())
        for method in _ROLES:
            adapters = _adapters({method: size}, backbone.places)
            yield Baseline(name=f"{method}({size}) everywhere", configuration=self.point(adapters))

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and all three methods at the hidden width in every block."""
        sizes = dict.fromkeys(_ROLES, self.sizes(backbone)[-1])
        return self.point(), self.point(_adapters(sizes, backbone.places))

    def count(self, backbone: Backbone) -> int:
        """Return the number of different configurations: those without any adapter count once."""
        sizes, patterns = len(self.sizes(backbone)) ** len(_ROLES), 2 ** len(backbone.places)
        return int((sizes - 1) * (patterns - 1) + 1)

    def summary(self, backbone: Backbone) -> str:
        """Say what is searched; see `SearchSpace.summary`."""
        ladder, blocks = "|".join(map(str, self.sizes(backbone))), len(backbone.places)
        return f"global sizes of series, parallel and prefix, each of {ladder}; {blocks} blocks on or off"


def _switch(place: Place) -> str:
    """Return the name of the parameter that says whether a block is on."""
    return f"{place_name(place)}.on"


def _adapters(sizes: Mapping[str, int], places: Iterable[Place]) -> dict[Site, tuple[Adapter, ...]]:
    """Return the methods whose size is above 0 in all of the blocks."""
    adapters: dict[Site, tuple[Adapter, ...]] = {}
    for stack, block in places:
        for method, size in sizes.items():
            site = Site(block, _ROLES[method], stack)
            if size:
                adapters[site] = (*adapters.get(site, ()), Adapter(method, size))
    return adapters
