"""Mutation and crossover of configurations."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.search_spaces.learning_rates import RATE_SPREAD, readable_learning_rate, summed_learning_rate
from autopeft.search_spaces.method_choice import Choices
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial

Adapters = dict[Site, Adapter]
Placed = Mapping[Site, tuple[Adapter, ...]]
# Shares of the children. Where nothing says which of two is better, they are even.
_SECOND_MOVE_SHARE = 0.5  # one move alone seldom leaves a local optimum
_CROSSED_SHARE = 0.25  # of those made in parameters, as in sites, where crossing is one of four moves
_SUM_KEPT_SHARE = 0.5  # they keep the summed learning rate, not that of each adapter
_RATE_CHANGED_SHARE = 0.5  # the others tell what the adapters alone change
_ALLOCATION_CHANGED_SHARE = 0.25  # as one of four moves, where a space has any
_LEAST_ODDS = 0.5  # of the mean: a parent that is worth nothing is drawn a third as often as an average one
_MOST_DROPPED = 4  # a quarter of a parent's adapters: two moves leave half of them or more


@dataclass(frozen=True, kw_only=True)
class Mutator(ABC):
    """Makes children of configurations; `learning_rate` has the range's ends, equal where it is fixed."""

    learning_rate: tuple[float, float]
    allocations: Sequence[str] = ()  # ways to allocate ranks in training, beside ranks that stay

    def __call__(self, parents: Mapping[Configuration, float], generator: random.Random) -> Configuration:
        """Return a configuration near one of the parents, with its learning rate or its summed one.

        Half the children keep either within the bounds, the others have a rate near it. Parents come with
        what each is worth, at least 0 (of the front, what it adds to the hypervolume). The head alone is a
        parent only where there is no other.
        """
        adapted = {parent: share for parent, share in parents.items() if parent.adapters} or parents
        mean = sum(adapted.values()) / len(adapted)
        weights = [share + _LEAST_ODDS * mean + 1e-12 for share in adapted.values()]
        parent, other = generator.choices(list(adapted), weights, k=2)
        adapters = self.changed(parent, other, generator)
        count = sum(len(several) for several in adapters.values())
        rate = parent.learning_rate
        if count and len(parent) and generator.random() < _SUM_KEPT_SHARE:
            rate = summed_learning_rate(parent) / count
        low, high = self.learning_rate
        if low < high and generator.random() < _RATE_CHANGED_SHARE:
            rate *= math.exp(generator.gauss(0, RATE_SPREAD))
        allocation = parent.allocation
        if self.allocations and generator.random() < _ALLOCATION_CHANGED_SHARE:
            allocation = generator.choice((None, *self.allocations))
        child = Configuration(adapters, learning_rate=readable_learning_rate(rate, low, high))
        return child.with_allocation(allocation)

    @abstractmethod
    def changed(self, parent: Configuration, other: Configuration, generator: random.Random) -> Placed:
        """Return a parent's adapters, changed a little or crossed with another's (which may be the same)."""


@dataclass(frozen=True, kw_only=True)
class ParameterMutator(Mutator):
    """Moves in the parameters of any space: some are drawn anew, or taken from another parent.

    `encode` returns the parameters of a point, `decode` asks a trial for parameters and returns their point.
    """

    encode: Callable[[Configuration], Mapping[str, Any]]
    decode: Callable[[SuggestTrial], Configuration]

    def changed(self, parent: Configuration, other: Configuration, generator: random.Random) -> Placed:
        """Draw one or two of the parameters anew; see `Mutator.changed`."""
        known = dict(self.encode(parent))
        if other is not parent and generator.random() < _CROSSED_SHARE:
            theirs = self.encode(other)
            known |= {name: theirs[name] for name in known if name in theirs and generator.random() < 0.5}
        names = sorted(known.keys() - {"learning_rate"})
        for _ in range(1 + (generator.random() < _SECOND_MOVE_SHARE)):
            if names:
                known.pop(generator.choice(names), None)
        return self.decode(DrawnTrial(generator, known)).adapters


@dataclass(frozen=True, kw_only=True)
class SiteMutator(Mutator):
    """Moves by site, role or block: resize, drop, add, cross over."""

    # The methods there are for every site that chooses for itself, one adapter each; in order.
    choices: Choices
    # How much each of these promises, at least 0: the better are added to, the worse dropped first.
    values: Mapping[Site, float]
    # Sites that carry the same, by the one of them that chooses; none where each does.
    tied: Mapping[Site, Sequence[Site]] = field(default_factory=dict)

    def changed(self, parent: Configuration, other: Configuration, generator: random.Random) -> Placed:
        """Move once or twice; see `Mutator.changed`."""
        moves = [self._resize, self._drop, self._add]
        if other is not parent:
            moves.append(partial(self._cross, self._chosen(other)))
        adapters = self._chosen(parent)
        for _ in range(1 + (generator.random() < _SECOND_MOVE_SHARE)):
            adapters = generator.choice(moves)(adapters, generator)
        carrying = [site for site in self.choices if site in adapters]
        return {place: (adapters[site],) for site in carrying for place in self.tied.get(site, (site,))}

    def _chosen(self, configuration: Configuration) -> Adapters:
        return {site: several[0] for site, several in configuration.adapters.items() if site in self.choices}

    def _resize(self, adapters: Adapters, generator: random.Random) -> Adapters:
        """Double or halve the sizes of a site, a role, a block or all."""
        factor = generator.choice((0.5, 2.0))
        changed = dict(adapters)
        for site in self._scope([site for site in self.choices if site in adapters], generator):
            size = round((adapters[site].size or 1) * factor)
            changed[site] = self.choices[site][adapters[site].method].of_size(size)
        return changed

    def _drop(self, adapters: Adapters, generator: random.Random) -> Adapters:
        """Take adapters out: the lowest block, which saves memory; where least is promised; or anywhere."""
        if not adapters:
            return adapters
        what = generator.choice(("lowest block", "anywhere", "least promising"))
        if what == "lowest block":
            lowest = min(adapters).place
            return {site: adapter for site, adapter in adapters.items() if site.place != lowest}
        order = sorted((site for site in self.choices if site in adapters), key=self.values.__getitem__)
        if what == "anywhere":
            generator.shuffle(order)
        count = generator.randint(1, max(1, len(order) // _MOST_DROPPED))
        return {site: adapters[site] for site in order[count:]}

    def _add(self, adapters: Adapters, generator: random.Random) -> Adapters:
        """Put adapters where there are none.

        Half of the additions follow the scores, half are random, as scores can be wrong.
        """
        empty = [site for site in self.choices if site not in adapters]
        if not empty:
            return adapters
        promised = [self.values[site] for site in empty]
        weighted = sum(promised) > 0 and generator.random() < 0.5
        first = generator.choices(empty, promised if weighted else None)[0]
        added = [first, *(site for site in self._scope(empty, generator) if site.place == first.place)]
        # Of families of different units it is not the number that is alike, but its place in the range.
        places = sorted(
            self.choices[site][adapter.method].place(adapter)
            for site, adapter in adapters.items()
            if adapter.size
        )
        place = places[len(places) // 2] if places else 0.5
        changed = dict(adapters)
        for site in added:
            changed[site] = generator.choice(list(self.choices[site].values())).at(place)
        return changed

    @staticmethod
    def _cross(theirs: Adapters, adapters: Adapters, generator: random.Random) -> Adapters:
        """Take each block from one parent or the other."""
        places = dict.fromkeys(site.place for site in sorted((*adapters, *theirs)))
        ours = {place for place in places if generator.random() < 0.5}
        mixed = {site: adapter for site, adapter in adapters.items() if site.place in ours}
        return mixed | {site: adapter for site, adapter in theirs.items() if site.place not in ours}

    @staticmethod
    def _scope(sites: Sequence[Site], generator: random.Random) -> list[Site]:
        """Return one of the sites, its role, its block, or all of them."""
        if not sites:
            return []
        chosen = generator.choice(sites)
        place, role = generator.choice(((True, True), (False, True), (True, False), (False, False)))
        return [
            site
            for site in sites
            if (not role or site.role == chosen.role) and (not place or site.place == chosen.place)
        ]
