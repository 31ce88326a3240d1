"""What a search space promises, and how its settings are checked."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from autopeft.core.configuration import Configuration
from autopeft.core.errors import unknown_choice
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.baselines import Baseline
from autopeft.search_spaces.learning_rates import LearningRate, learning_rate_bounds
from autopeft.search_spaces.method_choice import Choices
from autopeft.search_spaces.mutation import Mutator, ParameterMutator
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial
from autopeft.sensitivity import SiteScores

_KEPT = "_of_backbones"
Space = TypeVar("Space", bound="SearchSpace")
Found = TypeVar("Found")


def once_a_backbone(method: Callable[[Space, Backbone], Found]) -> Callable[[Space, Backbone], Found]:
    """Keep what a method of a space returns for a backbone, as long as both live."""

    @wraps(method)
    def kept(space: Space, backbone: Backbone) -> Found:
        known = vars(space).setdefault(_KEPT, WeakKeyDictionary()).setdefault(backbone, {})
        if method.__name__ not in known:
            known[method.__name__] = method(space, backbone)
        found: Found = known[method.__name__]
        return found

    return kept


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
    * `count` is the number of different configurations, learning rates apart.
    """

    learning_rate: LearningRate

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but what hangs on a backbone of this process."""
        return {name: value for name, value in vars(self).items() if name != _KEPT}

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """Names of the sensitivity scores that a search has to compute before it can use the space."""
        return ()

    def with_scores(self, scores: Mapping[str, SiteScores]) -> SearchSpace:
        """Return the space with the scores it needs."""
        return self

    @abstractmethod
    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError where the space does not fit the backbone."""

    @abstractmethod
    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask the trial for its parameters and decode them."""

    @abstractmethod
    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters that `suggest` decodes to a configuration.

        Raises:
            ValueError: The configuration is no point of the space.
        """

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Return a point drawn by chance; by default every parameter is drawn evenly.

        Args:
            generator: The only source of chance.
            backbone: The backbone.
        """
        return self.suggest(DrawnTrial(generator), backbone)

    def mutator(self, backbone: Backbone) -> Mutator:
        """Return what makes points near given ones; by default some parameters are drawn anew."""
        return ParameterMutator(
            learning_rate=learning_rate_bounds(self.learning_rate),
            encode=lambda configuration: self.encode(configuration, backbone),
            decode=lambda trial: self.suggest(trial, backbone),
        )

    @abstractmethod
    def choices(self, backbone: Backbone) -> Choices:
        """Return the methods that each site may carry.

        Where several sites carry the same, the first of them stands for all.
        """

    @abstractmethod
    def baselines(self, backbone: Backbone, trials: int | None = None) -> tuple[Baseline, ...]:
        """Return the points to try first: what people do today.

        The cheapest and most informative come first, and each method once before any at another size.

        Args:
            backbone: The backbone.
            trials: Trials of the search's budget, of which at most a quarter are baselines, but two at least;
                None where it is not known, for all of them.
        """

    @abstractmethod
    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the points with the fewest and the most trainable parameters."""

    @abstractmethod
    def count(self, backbone: Backbone) -> int:
        """Return the number of different configurations, learning rates apart."""

    @abstractmethod
    def describe(self, backbone: Backbone) -> str:
        """Say what is searched on this backbone, and how many points there are."""


def checked_names(kind: str, names: Sequence[str], valid: Iterable[str]) -> tuple[str, ...]:
    """Return names (or the only one) as a tuple.

    Raises:
        ValueError: There is none, or one is not valid or given twice.
    """
    given = (names,) if isinstance(names, str) else tuple(names)
    choices = tuple(valid)
    if not given:
        raise ValueError(f"A search space needs a {kind}, one or more of {', '.join(choices)}.")
    for name in given:
        if name not in choices:
            raise unknown_choice(kind, name, choices)
    if len(set(given)) != len(given):
        raise ValueError(f"A {kind} is named twice: {', '.join(given)}.")
    return given


def size_ladder(bounds: Any, name: str) -> tuple[int, ...]:
    """Return the powers of two within (smallest, largest), both ends included.

    Raises:
        ValueError: The bounds are not two whole numbers in rising order, at least 1.
    """
    whole = (
        isinstance(bounds, tuple | list)
        and len(bounds) == 2
        and all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
    )
    if not whole or not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(
            f"{name} is (smallest, largest), two whole numbers from 1 up, got {bounds!r}; "
            "to have no adapter at a site is always possible and needs no size 0."
        )
    low, high = bounds
    powers = (2**exponent for exponent in range(high.bit_length()))
    return tuple(sorted({low, *(power for power in powers if low < power < high), high}))


def scores_of(site_scores: Mapping[str, SiteScores], name: str) -> SiteScores:
    """Return the scores of a name.

    Raises:
        ValueError: They have not been given to the space.
    """
    if name not in site_scores:
        raise ValueError(
            f"The space has no {name!r} scores yet: use it in a Search, which computes them, or call "
            "with_scores(autopeft.sensitivity.compute_scores(...))."
        )
    return site_scores[name]


def describe_range(bounds: Iterable[float]) -> str:
    """Say from where to where bounds go."""
    return " to ".join(f"{bound:g}" for bound in bounds)


def check_range(name: str, bounds: Any, low: float, high: float) -> None:
    """Raise ValueError where bounds are not (lowest, highest) between two numbers."""
    numbers = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not numbers or not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} is (lowest, highest), two numbers in [{low:g}, {high:g}], got {bounds!r}.")
