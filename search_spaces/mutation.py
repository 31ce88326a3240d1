"""Local refinement: change a configuration of the front a little, where its sites are worth it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.search_spaces.base import log_place, readable_learning_rate, summed_learning_rate

Adapters = dict[Site, Adapter]
_SECOND_MOVE_SHARE = 0.5
_SUM_KEPT_SHARE = 0.5  # children that keep the summed learning rate, and not that of each adapter
_RATE_SHARE = 0.5
_RATE_SPREAD = 0.4  # of the logarithm: a factor of 1.5


@dataclass(frozen=True, kw_only=True)
class SizedMethod:
    """A method at a site, with the sizes it may have.

    Attributes:
        method: A method with a size.
        smallest: Its smallest size.
        largest: Its largest size.
        options: Options of its adapters.
    """

    method: str
    smallest: int
    largest: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def of_size(self, size: int) -> Adapter:
        """Return the adapter of a size, or of the nearest there is."""
        return Adapter(self.method, min(max(size, self.smallest), self.largest), dict(self.options))

    def place(self, adapter: Adapter) -> float:
        """Return where an adapter's size lies on a log scale, from 0.5 (smallest) to 1 (largest)."""
        size = min(max(adapter.size or self.smallest, self.smallest), self.largest)
        return 0.5 + 0.5 * log_place(size, self.smallest, self.largest)


Choices = Mapping[Site, Mapping[str, SizedMethod]]
"""The methods that each site takes, by name, with their sizes."""


@dataclass(frozen=True, kw_only=True)
class Mutator:
    """Moves in the full per-layer space: resize, drop, add, cross over, and another learning rate.

    Attributes:
        choices: The methods there are for every site.
        values: How much each site promises, at least 0: the better are added to, the worse dropped first.
        learning_rate: (lowest, highest) of the learning rate; equal where it is fixed.
    """

    choices: Choices
    values: Mapping[Site, float]
    learning_rate: tuple[float, float]

    def child(self, parents: Mapping[Configuration, float], generator: random.Random) -> Configuration:
        """Return a configuration near one of the parents, with its learning rate or its summed one.

        Half the children keep either within the bounds, the others have a rate near it.

        Args:
            parents: Configurations with one adapter a site, and what each is worth, at least 0 (of the front,
                what it adds to the hypervolume): the more, the more often it is a parent. The head alone is
                one only where there is no other.
            generator: Decides everything.
        """
        adapted = {one: share for one, share in parents.items() if len(one)} or parents
        mean = sum(adapted.values()) / len(adapted)
        weights = [share + mean / 2 + 1e-12 for share in adapted.values()]
        parent, other = generator.choices(list(adapted), weights, k=2)
        moves = [self._resize, self._drop, self._add]
        if other is not parent:
            moves.append(partial(self._cross, other))
        adapters = {site: several[0] for site, several in parent.adapters.items()}
        for _ in range(1 + (generator.random() < _SECOND_MOVE_SHARE)):
            adapters = generator.choice(moves)(adapters, generator)
        rate = parent.learning_rate
        if adapters and len(parent) and generator.random() < _SUM_KEPT_SHARE:
            rate = summed_learning_rate(parent) / len(adapters)
        return Configuration(adapters, learning_rate=self._rate(rate, generator))

    def _resize(self, adapters: Adapters, generator: random.Random) -> Adapters:
        """Double or halve the sizes of a site, a role, a block or all."""
        factor = generator.choice((0.5, 2.0))
        changed = dict(adapters)
        for site in self._scope(sorted(adapters), generator):
            size = round((adapters[site].size or 1) * factor)
            changed[site] = self.choices[site][adapters[site].method].of_size(size)
        return changed

    def _drop(self, adapters: Adapters, generator: random.Random) -> Adapters:
        """Take adapters out: the lowest block, which saves memory; where least is promised; or anywhere."""
        if not adapters:
            return adapters
        choice = generator.randrange(3)
        if choice == 0:
            lowest = min(site.block for site in adapters)
            return {site: one for site, one in adapters.items() if site.block != lowest}
        order = sorted(adapters, key=lambda site: (self.values[site], site))
        if choice == 1:
            generator.shuffle(order)
        count = generator.randint(1, max(1, len(order) // 4))
        return {site: adapters[site] for site in order[count:]}

    def _add(self, adapters: Adapters, generator: random.Random) -> Adapters:
        """Put adapters where there are none: half of them where more is promised, half anywhere.

        Promises are made before anything is trained; what they pass over would never be found out.
        """
        empty = sorted(self.choices.keys() - adapters.keys())
        if not empty:
            return adapters
        promised = [self.values[site] for site in empty]
        weighted = sum(promised) > 0 and generator.random() < 0.5
        first = generator.choices(empty, promised if weighted else None)[0]
        added = [first, *(site for site in self._scope(empty, generator) if site.block == first.block)]
        sizes = sorted(one.size or 1 for one in adapters.values())
        changed = dict(adapters)
        for site in added:
            chosen = generator.choice(list(self.choices[site].values()))
            changed[site] = chosen.of_size(sizes[len(sizes) // 2] if sizes else chosen.smallest)
        return changed

    @staticmethod
    def _cross(other: Configuration, adapters: Adapters, generator: random.Random) -> Adapters:
        """Take each block from one parent or the other."""
        theirs = {site: several[0] for site, several in other.adapters.items()}
        blocks = sorted({site.block for site in (*adapters, *theirs)})
        ours = {block for block in blocks if generator.random() < 0.5}
        mixed = {site: one for site, one in adapters.items() if site.block in ours}
        return mixed | {site: one for site, one in theirs.items() if site.block not in ours}

    @staticmethod
    def _scope(sites: Sequence[Site], generator: random.Random) -> list[Site]:
        """Return one of the sites, its role, its block, or all of them."""
        if not sites:
            return []
        chosen = generator.choice(list(sites))
        scope = generator.choice(("site", "role", "block", "all"))
        return [
            site
            for site in sites
            if scope == "all"
            or (scope == "site" and site == chosen)
            or (scope == "role" and site.role == chosen.role)
            or (scope == "block" and site.block == chosen.block)
        ]

    def _rate(self, rate: float, generator: random.Random) -> float:
        low, high = self.learning_rate
        if low < high and generator.random() < _RATE_SHARE:
            rate *= math.exp(generator.gauss(0, _RATE_SPREAD))
        return readable_learning_rate(rate, low, high)
