"""Settings of warm starts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Initialise trials from a LoRA supernet that is trained once a search.

    Trials that have LoRA alone are initialised from it, baselines apart; further trainings of a trial with
    other seeds from supernets of their own. A supernet is trained when it is first needed, and its compute
    is part of what the search costs.

    Attributes:
        trainings: Length of a supernet's training, in trainings of one configuration.

    Raises:
        ValueError: A number is out of range.
    """

    trainings: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.trainings) and self.trainings > 0):
            raise ValueError(f"trainings is a number above 0, got {self.trainings!r}.")

    def describe(self) -> str:
        """Describe the settings in a line."""
        return f"LoRA trials are initialised from a supernet of {self.trainings:g} trainings"
