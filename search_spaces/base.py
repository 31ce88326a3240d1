"""What a search space promises, and what every space does in the same way."""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any, Self

from autopeft.core.configuration import AdapterLike, Configuration, Site
from autopeft.core.errors import checked_names
from autopeft.core.rank_allocation import RANK_ALLOCATIONS
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.learning_rates import (
    LearningRate,
    checked_learning_rate,
    fitting_learning_rates,
    learning_rate_at,
    learning_rate_bounds,
    suggest_learning_rate,
)
from autopeft.search_spaces.method_choice import Choices
from autopeft.search_spaces.mutation import Mutator, ParameterMutator
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial
from autopeft.sensitivity import SiteScores

_ALLOCATION, _FIXED = "allocation", "fixed"
_LARGEST_SHARE = 4  # baselines are at most a quarter of the trials: most are to be chosen by what was found
FEWEST_BASELINES = 2  # the head alone says what adapters add, the smallest one that they add anything


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A point of a space that a search tries before it samples.

    Attributes:
        name: What it stands for, as in "lora(8) everywhere".
        configuration: The point.
        is_trained_whole: Whether rungs train it to the end whatever it promises there.
    """

    name: str
    configuration: Configuration
    is_trained_whole: bool = True


@dataclass(frozen=True, kw_only=True)
class SearchSpace(ABC):
    """Which configurations there are: turns a trial's parameters into a configuration, and back.

    Guarantees (checked for every space by `tests/search_spaces/test_contract.py`):

    * `suggest` depends on nothing but the trial and the backbone, and gives a configuration that the
      backbone can carry;
    * `suggest(FixedTrial(encode(c)))` gives `c` back for every point `c` of the space, and `encode` raises
      for everything else;
    * what `draw` and the `mutator` give are points of the space, and follow from the generator;
    * `baselines` and both ends of `extremes` are points of the space, and no point has fewer trainable
      parameters than the first end or more than the second;
    * `count` is the number of different configurations, learning rates and allocations apart.

    A space of one's own is a frozen data class. Derived from `MethodSpace`, it needs `suggest_adapters`,
    `encode_adapters`, `all_baselines`, `summary`, `extremes` and `count`; `SlotSpace` has the last two.

    Attributes:
        learning_rate: A number, or (lowest, highest) to search it on a log scale. By default a search takes
            the range that fits the backbone's hidden size and the steps of a training.
        allocations: Ways to allocate ranks in training, to choose from beside ranks that stay, as
            ("adalora", "sora"). What an allocation cannot be used with has ranks that stay.

    Raises:
        ValueError: The learning rate or an allocation is not valid.
    """

    learning_rate: LearningRate | None = None
    allocations: Sequence[str] = field(default=(), metadata={"unset": ()})

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", checked_learning_rate(self.learning_rate))
        if self.allocations:
            names = checked_names("allocation", self.allocations, RANK_ALLOCATIONS)
            object.__setattr__(self, "allocations", names)

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """Names of the sensitivity scores that a search has to compute before it can use the space."""
        return ()

    @property
    def constraints(self) -> Mapping[str, float | str]:
        """Bounds that a `Search` of the space has, where its own `constraints` say no others."""
        return {}

    def with_scores(self, scores: Mapping[str, SiteScores]) -> Self:
        """Return the space with the scores it needs."""
        return self

    def with_learning_rates(self, backbone: Backbone, steps: int) -> Self:
        """Return the space with learning rates: its own, or those that fit a training of so many steps."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=fitting_learning_rates(backbone.hidden_size, steps))

    @abstractmethod
    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError where the space does not fit the backbone."""

    def check_allocations(self, backbone: Backbone) -> None:
        """Raise ValueError where no site can carry the method whose ranks an allocation decides about."""
        possible = {method for methods in self.choices(backbone).values() for method in methods}
        for allocation in self.allocations:
            method = RANK_ALLOCATIONS[allocation].method
            if method not in possible:
                raise ValueError(
                    f"The allocation {allocation!r} decides about the ranks of {method!r}, which is none of "
                    f"the space's methods on {backbone.name}: {', '.join(sorted(possible))}."
                )

    @abstractmethod
    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> Mapping[Site, AdapterLike]:
        """Ask the trial for all parameters but the learning rate, and decode them."""

    @abstractmethod
    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters that `suggest_adapters` decodes to a configuration's adapters.

        It may take any configuration for a point, as `encode` decodes what it returns. Of parameters that it
        leaves out, which then do not matter, `encode` takes the first choice.
        """

    @abstractmethod
    def choices(self, backbone: Backbone) -> Choices:
        """Return the methods that each site may carry, in the order of the sites.

        Where several sites carry the same, the first of them stands for all.
        """

    @abstractmethod
    def all_baselines(self, backbone: Backbone) -> Iterable[Baseline]:
        """Return what people do today; points may be equal.

        The cheapest and most informative come first, and each method once before any at another size.
        """

    @abstractmethod
    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the points with the fewest and the most trainable parameters."""

    def ends(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return `extremes`; where the smallest trains nothing at all, the smallest adapter in its place.

        Costs are compared on a log scale, which does not go down to nothing.
        """
        smallest, largest = self.extremes(backbone)
        if len(smallest) or backbone.head:
            return smallest, largest
        single = (
            Configuration({site: choice.smallest})
            for site, methods in self.choices(backbone).items()
            for choice in methods.values()
        )
        return min(single, key=lambda configuration: count_parameters(backbone, configuration)), largest

    @abstractmethod
    def count(self, backbone: Backbone) -> int:
        """Return the number of different configurations, learning rates apart."""

    @abstractmethod
    def summary(self, backbone: Backbone) -> str:
        """Say what is searched on this backbone, learning rate and number of points apart."""

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask the trial for its parameters and decode them."""
        adapters = self.suggest_adapters(trial, backbone)
        configuration = Configuration(
            adapters, learning_rate=suggest_learning_rate(trial, self.learning_rate)
        )
        if not self.allocations:
            return configuration
        allocation = trial.suggest_categorical(_ALLOCATION, (_FIXED, *self.allocations))
        return configuration.with_allocation(None if allocation == _FIXED else allocation)

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters that `suggest` decodes to a configuration.

        Raises:
            ValueError: The configuration is no point of the space; says which is near.
        """
        near, parameters = self._nearest(configuration, backbone)
        if near == configuration:
            return parameters
        raise ValueError(f"{configuration!r} is no point of {type(self).__name__}; one near it is {near!r}.")

    def nearest(self, configuration: Configuration, backbone: Backbone) -> Configuration:
        """Return a point near a configuration: itself, where it is one."""
        return self._nearest(configuration, backbone)[0]

    def _nearest(
        self, configuration: Configuration, backbone: Backbone
    ) -> tuple[Configuration, dict[str, Any]]:
        known = self.encode_adapters(configuration, backbone)
        known |= {
            "learning_rate": configuration.learning_rate,
            _ALLOCATION: configuration.allocation or _FIXED,
        }
        trial = DrawnTrial(None, known)
        return self.suggest(trial, backbone), trial.params

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Return a point drawn by the generator alone; by default every parameter is drawn evenly."""
        return self.suggest(DrawnTrial(generator), backbone)

    def mutator(self, backbone: Backbone) -> Mutator:
        """Return what makes points near given ones; by default some parameters are drawn anew."""
        return ParameterMutator(
            learning_rate=learning_rate_bounds(self.learning_rate),
            allocations=self.allocations,
            encode=partial(self.encode, backbone=backbone),
            decode=partial(self.suggest, backbone=backbone),
        )

    def point(self, adapters: Mapping[Site, AdapterLike] | None = None, place: float = 0.5) -> Configuration:
        """Return adapters, or the head alone, with the learning rate at a place, from 0 (lowest) to 1.

        The middle of the default range is the rate that published sweeps predict.
        """
        return Configuration(adapters, learning_rate=learning_rate_at(place, self.learning_rate))

    def baselines(self, backbone: Backbone, trials: int | None = None) -> tuple[Baseline, ...]:
        """Return the points to try first, each once; see `all_baselines`.

        Of a search's budget of `trials` at most a quarter are baselines, but two at least; None for all.
        """
        found: dict[Configuration, Baseline] = {}
        for baseline in self.all_baselines(backbone):
            if not len(baseline.configuration) and not backbone.head:
                baseline = replace(baseline, name="untrained model")
            found.setdefault(baseline.configuration, baseline)
        room = len(found) if trials is None else max(FEWEST_BASELINES, trials // _LARGEST_SHARE)
        return tuple(found.values())[:room]

    def describe(self, backbone: Backbone) -> str:
        """Say what is searched on this backbone, and how many points there are."""
        lowest, highest = learning_rate_bounds(self.learning_rate)
        rate = f"fixed at {lowest:g}" if lowest == highest else f"log-uniform in [{lowest:g}, {highest:g}]"
        ways = f"ranks that stay, or {', '.join(self.allocations)}\n" if self.allocations else ""
        fewest, most = (count_parameters(backbone, end) for end in self.extremes(backbone))
        count: int | Decimal = self.count(backbone)
        if count > sys.float_info.max:  # as of deep backbones
            count = Decimal(count)
        return (
            f"{type(self).__name__}: {self.summary(backbone)}\n"
            f"learning rate {rate}\n{ways}"
            f"{count:.3g} configurations, {fewest:,} to {most:,} trainable parameters"
        )
