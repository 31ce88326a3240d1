"""Better candidates from good ones: the best are changed a little, and their best children again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from autopeft.core.configuration import Configuration
from autopeft.optimization.gaussian_process import Array
from autopeft.search_spaces.mutation import Mutator

_ROUNDS = 3
_PARENTS = 8
_CHILDREN = 48


def local_search(
    candidates: Sequence[Configuration],
    worth: Callable[[Sequence[Configuration]], Array],
    refiner: Mutator,
    generator: random.Random,
) -> list[Configuration]:
    """Return changed candidates, which a few rounds of choosing the best have led to.

    Local search on an acquisition function, as SMAC does it from its best configurations (Hutter, Hoos and
    Leyton-Brown, "Sequential Model-Based Optimization for General Algorithm Configuration", 2011): drawing
    alone seldom meets what a model of many sites thinks best.

    Args:
        candidates: Where to begin; at least one.
        worth: Says of candidates what they are worth, at least 0.
        refiner: Changes a candidate.
        generator: Decides everything.
    """
    found: list[Configuration] = []
    best = list(candidates)
    for _ in range(_ROUNDS):
        values = worth(best)
        order = sorted(range(len(best)), key=lambda index: -values[index])[:_PARENTS]
        parents = {best[index]: float(values[index]) for index in order}
        children = [refiner.child(parents, generator) for _ in range(_CHILDREN)]
        children = [one for one in children if len(one)]
        found += children
        best = [*parents, *children]
    return found
