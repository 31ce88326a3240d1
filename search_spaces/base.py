"""What a search space promises, and the pieces spaces are made of."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FixedTrial, Trial

from autopeft.core.configuration import Configuration
from autopeft.core.errors import unknown_choice
from autopeft.core.objectives import Constraint
from autopeft.core.pareto import Axis
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import SiteScores

LearningRate = float | tuple[float, float]
"""A fixed learning rate, or the (lowest, highest) of a log-uniform choice."""

SuggestTrial = Trial | FixedTrial | optuna.trial.FrozenTrial


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A reference point of a space that a search tries before it samples.

    Attributes:
        name: What it stands for, as in "lora 8 everywhere".
        configuration: A point of the space.
        is_trained_whole: Whether rungs train it to the end whatever it promises there.
    """

    name: str
    configuration: Configuration
    is_trained_whole: bool = True


@dataclass(frozen=True, kw_only=True)
class History:
    """What a search has found so far and what it is after, for a space that proposes trials.

    Attributes:
        trials: Configurations that were tried, each with the values known of it: all objectives of a
            complete trial, only the costs of one that broke a constraint, none of one that is to be
            trained together with the next. Where a training failed, its
            metrics are the worst there are; where it is paused, those it is expected to reach.
        trainings: How many trainings the values of each trial are the means of; one each where empty.
        axes: The axes of the hypervolume.
        constraints: Bounds on what is exact before training.
        is_prefix_served: Whether training does without running the blocks below the lowest adapted one.
    """

    trials: Sequence[tuple[Configuration, Mapping[str, float]]]
    axes: Sequence[Axis]
    constraints: Sequence[Constraint] = ()
    trainings: Sequence[int] = ()
    is_prefix_served: bool = False


def distinct(baselines: Iterable[Baseline]) -> tuple[Baseline, ...]:
    """Return the baselines without those whose configuration an earlier one has."""
    found: dict[Configuration, Baseline] = {}
    for baseline in baselines:
        found.setdefault(baseline.configuration, baseline)
    return tuple(found.values())


class SearchSpace(ABC):
    """What can be searched: turns an Optuna trial into a configuration.

    Guarantees (checked for every space by `tests/search_spaces/test_contract.py`):

    * `suggest` depends on nothing but the trial and the backbone, and gives a configuration that the
      backbone can carry;
    * `suggest(FixedTrial(encode(c)))` gives `c` back for every point `c` of the space;
    * `baselines` and both ends of `extremes` are points of the space, and no point has fewer trainable
      parameters than the first end or more than the second;
    * `count` is the number of different configurations, learning rates apart.
    """

    learning_rate: LearningRate

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """Names of the sensitivity scores that a search has to compute before it can use the space."""
        return ()

    def with_scores(self, scores: Mapping[str, SiteScores]) -> SearchSpace:
        """Return the space with the scores it needs."""
        return self

    def proposes(self, number: int) -> bool:
        """Whether the space may have a say in a trial, so that `propose` is worth asking."""
        return False

    def propose(
        self,
        number: int,
        front: Mapping[Configuration, float],
        generator: random.Random,
        backbone: Backbone,
        history: History,
    ) -> Mapping[str, Any] | None:
        """Return parameters of a trial (some or all), to be used in place of what the sampler would ask.

        Args:
            number: The trial's number.
            front: Configurations of the front so far, each with what it adds to the hypervolume.
            generator: The trial's own; the only source of chance.
            backbone: The backbone.
            history: Every trial so far, and what the search is after.
        """
        return None

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

    @abstractmethod
    def baselines(self, backbone: Backbone) -> tuple[Baseline, ...]:
        """Return the reference points to try first: what people do today, at several sizes."""

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


def checked_learning_rate(learning_rate: Any) -> LearningRate:
    """Return a learning rate or a range of it.

    Raises:
        ValueError: Not a positive number nor two of them in rising order.
    """
    if isinstance(learning_rate, int | float) and not isinstance(learning_rate, bool):
        bounds: tuple[float, ...] = (float(learning_rate),)
    elif isinstance(learning_rate, tuple | list) and len(learning_rate) == 2:
        bounds = tuple(float(bound) for bound in learning_rate)
    else:
        raise ValueError(f"learning_rate is a number, or (lowest, highest), got {learning_rate!r}.")
    if any(not math.isfinite(bound) or bound <= 0 for bound in bounds) or bounds[0] > bounds[-1]:
        raise ValueError(f"learning_rate must be above 0 with the lowest first, got {learning_rate!r}.")
    return bounds[0] if len(bounds) == 1 or bounds[0] == bounds[1] else (bounds[0], bounds[1])


def suggest_learning_rate(trial: SuggestTrial, learning_rate: LearningRate) -> float:
    """Ask for the learning rate on a log scale; three significant digits keep it readable."""
    if isinstance(learning_rate, float):
        return learning_rate
    low, high = learning_rate
    return readable_learning_rate(trial.suggest_float("learning_rate", low, high, log=True), low, high)


def readable_learning_rate(value: float, low: float, high: float) -> float:
    """Return a learning rate of three significant digits within bounds, which may have more."""
    readable = float(f"{value:.3g}") if low < value < high else value
    return min(max(readable, low), high)


def log_place(value: float, low: float, high: float) -> float:
    """Return where a value lies between two others on a log scale."""
    return math.log(value / low) / (math.log(high / low) or 1.0)


def summed_learning_rate(configuration: Configuration) -> float:
    """Return the learning rate times the number of adapters, or of the head alone the learning rate.

    Adam divides gradients by their size, so a step moves every weight by about the learning rate, however
    many there are, and what adapters change in the model's output adds up: several learn at a rate at which
    one learns next to nothing. The sum foretells better what a configuration reaches (`python -m
    benchmarks.surrogate`).
    """
    return configuration.learning_rate * max(1, len(configuration))


def draw_learning_rate(generator: random.Random, learning_rate: LearningRate) -> float:
    """Draw a learning rate evenly on a log scale."""
    if isinstance(learning_rate, float):
        return learning_rate
    low, high = learning_rate
    return readable_learning_rate(low * (high / low) ** generator.random(), low, high)


def encode_learning_rate(value: float, learning_rate: LearningRate) -> dict[str, float]:
    """Return the parameter that `suggest_learning_rate` decodes to `value`."""
    if isinstance(learning_rate, float):
        if value != learning_rate:
            raise ValueError(f"The space fixes the learning rate at {learning_rate:g}, not {value:g}.")
        return {}
    low, high = learning_rate
    if not low <= value <= high:
        raise ValueError(f"The learning rate {value:g} is outside [{low:g}, {high:g}].")
    if value != readable_learning_rate(value, low, high):
        raise ValueError(
            f"The space has learning rates of three digits such as "
            f"{readable_learning_rate(value, low, high):g}, "
            f"not {value!r}."
        )
    return {"learning_rate": value}


def middle_learning_rate(learning_rate: LearningRate) -> float:
    """Return the geometric middle of the range: what a baseline is trained with."""
    return learning_rate_at(0.5, learning_rate)


def learning_rate_at(place: float, learning_rate: LearningRate) -> float:
    """Return the learning rate at a place on the range's log scale, from 0 (lowest) to 1; two digits."""
    if isinstance(learning_rate, float):
        return learning_rate
    low, high = learning_rate
    return min(max(float(f"{low * (high / low) ** place:.2g}"), low), high)


def describe_learning_rate(learning_rate: LearningRate) -> str:
    """Say how the learning rate is chosen."""
    if isinstance(learning_rate, float):
        return f"fixed at {learning_rate:g}"
    return f"log-uniform in [{learning_rate[0]:g}, {learning_rate[1]:g}]"


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


def options_of(options: Mapping[str, Mapping[str, Any]], method: str) -> Mapping[str, Any]:
    """Return the options the user fixed for a method."""
    return options.get(method, {})


def describe_range(bounds: Iterable[float]) -> str:
    """Say from where to where bounds go."""
    return " to ".join(f"{bound:g}" for bound in bounds)


def check_range(name: str, bounds: Any, low: float, high: float) -> None:
    """Raise ValueError where bounds are not (lowest, highest) between two numbers."""
    numbers = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not numbers or not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} is (lowest, highest), two numbers in [{low:g}, {high:g}], got {bounds!r}.")
