"""Better candidates from good ones: the best are changed a little, and their best children again."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from autopeft.core.configuration import Configuration
from autopeft.optimization.gaussian_process import Array
from autopeft.search_spaces.mutation import Mutator

_ROUNDS = 3  # so that what is found is some moves away from what is known
_PARENTS_A_ROUND = 8  # several, as the best alone would lead to one local optimum
_CHILDREN_A_ROUND = 48  # three rounds predict fewer candidates than the pool they begin from


def local_search(
    candidates: Sequence[Configuration],
    worth: Callable[[Sequence[Configuration]], Array],
    mutator: Mutator,
    generator: random.Random,
) -> list[Configuration]:
    """Return changed candidates, which a few rounds of choosing the best have led to.

    Local search on an acquisition function, as SMAC does it from its best configurations (Hutter, Hoos and
    Leyton-Brown, "Sequential Model-Based Optimization for General Algorithm Configuration", 2011): drawing
    alone seldom meets what a model of many sites thinks best.

    Args:
        candidates: Where to begin; at least one.
        worth: Says of candidates what they are worth, at least 0.
        mutator: Changes a candidate.
        generator: Decides everything.
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
