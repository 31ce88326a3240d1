"""Learning rates near those that have proved good: of the front's configurations of about the same size."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from autopeft.core.configuration import Configuration
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.learning_rates import readable_learning_rate, summed_learning_rate

_RATE_SPREAD = 0.5  # of the logarithm, a factor of 1.6: near what is good, and yet tells rates apart


class LearningRatePrior:
    """The summed learning rates of the front, by the number of trainable parameters.

    Few adapters need higher rates than many: a rate drawn evenly from the whole range is wrong for most
    configurations. One with the sum of a good configuration of about the same size seldom is; see
    `summed_learning_rate`.

    The head alone, which bears higher rates than any adapter, is followed only where there is no other, and
    then by its learning rate: it has no adapters to sum over.

    Args:
        front: Configurations of the front; at least one.
        backbone: Counts parameters.
        bounds: (lowest, highest) learning rate.
    """

    def __init__(
        self, front: Iterable[Configuration], backbone: Backbone, bounds: tuple[float, float]
    ) -> None:
        self._backbone = backbone
        self._bounds = bounds
        members = list(front)
        self._known = [
            (self._size(member), summed_learning_rate(member)) for member in members if member.adapters
        ]
        self._of_head = members[0].learning_rate

    def _size(self, configuration: Configuration) -> float:
        return math.log(max(1, count_parameters(self._backbone, configuration)))

    def draw(self, configuration: Configuration, generator: random.Random) -> float:
        """Draw a learning rate whose sum is near that of the front's configuration nearest in size."""
        rate = self._of_head
        if self._known:
            size = self._size(configuration)
            _, summed = min(self._known, key=lambda known: abs(known[0] - size))
            rate = summed / max(1, len(configuration))
        return readable_learning_rate(rate * math.exp(generator.gauss(0, _RATE_SPREAD)), *self._bounds)
