"""What a trial may try: draws of a space, points near the front, single adapters, and a local search."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import geometric_mean

from autopeft.core.configuration import Configuration
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.optimization.gaussian_process import Array
from autopeft.search_spaces import SearchSpace
from autopeft.search_spaces.learning_rates import (
    RATE_SPREAD,
    learning_rate_at,
    learning_rate_bounds,
    readable_learning_rate,
    summed_learning_rate,
)
from autopeft.search_spaces.method_choice import Choices
from autopeft.search_spaces.mutation import Mutator

# Of a pool, which is predicted in some tenths of a second (`benchmarks/overhead.py`): most of what is best is
# near the front, what is unlike it is not to be missed. Chosen on MiniLM alone (questions, spam).
_DRAWN_CANDIDATES = 32
_MUTATED_CANDIDATES = 128
_ROUNDS = 3  # so that what is found is some moves away from what is known
_PARENTS_A_ROUND = 8  # about as many as in SMAC, ten: the best alone would lead to one local optimum
_CHILDREN_A_ROUND = 48  # three rounds predict fewer candidates than the pool they begin from


class Candidates:
    """What one trial may try, as its generator decides.

    Configurations of the front come with what they add to the hypervolume; for the rates of earlier searches
    and cuts see `History`.
    """

    def __init__(
        self,
        space: SearchSpace,
        backbone: Backbone,
        front: Mapping[Configuration, float],
        generator: random.Random,
        earlier_rates: Mapping[str, float],
        cuts: Sequence[Configuration] = (),
    ) -> None:
        self._space, self._backbone, self._generator = space, backbone, generator
        self._cuts = [space.nearest(cut, backbone) for cut in cuts]
        self._front = front
        self._mutator = space.mutator(backbone)
        rates = learning_rate_bounds(space.learning_rate)
        is_fixed = rates[0] == rates[1]
        self._rates = None if is_fixed else LearningRatePrior(front, backbone, rates, earlier_rates)

    def pool(self, worth: Callable[[Sequence[Configuration]], Array]) -> list[Configuration]:
        """Return drawn points, points near the front, cuts, and what a local search leads to from these.

        Each of the former stands there with two learning rates, its own and one of a sum near what the front
        has. The head alone is not among them: it is a baseline, and would often be tried again for the noise
        in its metric.
        """
        found = [self._space.draw(self._generator, self._backbone) for _ in range(_DRAWN_CANDIDATES)]
        found += [self._mutator(self._front, self._generator) for _ in range(_MUTATED_CANDIDATES)]
        found = [candidate for candidate in [*found, *self._cuts] if candidate.adapters]
        found += [] if self._rates is None else self._with_near_rates(found)
        return found + (local_search(found, worth, self._mutator, self._generator) if found else [])

    def probes(self, tried: Iterable[Configuration]) -> list[Configuration]:
        """Return single adapters where none was tried, with learning rates of a sum near the front's."""
        rate = learning_rate_at(1.0, self._space.learning_rate)
        probes = single_adapter_probes(self._space.choices(self._backbone), tried, rate)
        return self._with_near_rates([probe for probe in probes if self._is_point(probe)])

    def _with_near_rates(self, candidates: Sequence[Configuration]) -> list[Configuration]:
        rates = self._rates
        if rates is None:
            return list(candidates)
        return [
            candidate.replace(learning_rate=rates.draw(candidate, self._generator))
            for candidate in candidates
        ]

    def _is_point(self, configuration: Configuration) -> bool:
        try:
            self._space.encode(configuration, self._backbone)
        except ValueError:
            return False
        return True


def single_adapter_probes(
    choices: Choices, tried: Iterable[Configuration], learning_rate: float
) -> list[Configuration]:
    """Return the smallest adapter of every method alone at every site where none of it was tried alone.

    Few sites can do with so little, and scores hardly tell which (`benchmarks/single_adapter_probes.py`).
    """
    alone = (configuration for configuration in tried if len(configuration.adapters) == 1)
    known = {(site, adapter.method) for configuration in alone for site, adapter in configuration}
    return [
        Configuration({site: choice.smallest}, learning_rate=learning_rate)
        for site, methods in choices.items()
        for name, choice in methods.items()
        if (site, name) not in known
    ]


class LearningRatePrior:
    """The summed learning rates of the front (one member or more), by the number of trainable parameters.

    Few adapters need higher rates than many; see `summed_learning_rate`. The head alone, which bears higher
    rates, is followed only where there is no other. Methods that the front lacks have rates near
    those of earlier searches.
    """

    def __init__(
        self,
        front: Iterable[Configuration],
        backbone: Backbone,
        bounds: tuple[float, float],
        earlier: Mapping[str, float],
    ) -> None:
        self._backbone = backbone
        self._bounds = bounds
        members = list(front)
        self._known = [
            (self._size(member), summed_learning_rate(member)) for member in members if member.adapters
        ]
        self._fallback = members[0].learning_rate
        on_front = {method for member in members for method in member.methods}
        self._earlier = {method: rate for method, rate in earlier.items() if method not in on_front}

    def _size(self, configuration: Configuration) -> float:
        return math.log(max(1, count_parameters(self._backbone, configuration)))

    def draw(self, configuration: Configuration, generator: random.Random) -> float:
        """Draw a learning rate whose sum is near that of the front's configuration nearest in size."""
        rate = self._fallback
        if earlier := [self._earlier[method] for method in configuration.methods if method in self._earlier]:
            rate = geometric_mean(earlier) / len(configuration)
        elif self._known:
            size = self._size(configuration)
            _, summed = min(self._known, key=lambda known: abs(known[0] - size))
            rate = summed / max(1, len(configuration))
        return readable_learning_rate(rate * math.exp(generator.gauss(0, RATE_SPREAD)), *self._bounds)


def local_search(
    candidates: Sequence[Configuration],
    worth: Callable[[Sequence[Configuration]], Array],
    mutator: Mutator,
    generator: random.Random,
) -> list[Configuration]:
    """Return changed candidates, which a few rounds of choosing the best have led to.

    Local search on an acquisition function as in SMAC (Hutter, Hoos and Leyton-Brown, "Sequential Model-Based
    Optimization for General Algorithm Configuration", 2011), of one candidate or more; none is worth less
    than 0.
    """
    found: list[Configuration] = []
    best = list(candidates)
    for _ in range(_ROUNDS):
        values = worth(best)
        order = sorted(range(len(best)), key=lambda index: -values[index])[:_PARENTS_A_ROUND]
        parents = {best[index]: float(values[index]) for index in order}
        children = [mutator(parents, generator) for _ in range(_CHILDREN_A_ROUND)]
        children = [child for child in children if child.adapters]
        found += children
        best = [*parents, *children]
    return found
