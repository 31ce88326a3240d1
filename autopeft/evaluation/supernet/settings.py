"""What a search is told about its one-shot elastic adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopeft.core.errors import check_share, check_whole

GENERATIONS = 3
"""Draws, then crossings of the best so far, that make up what is proposed from."""


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """Train a one-shot elastic adapter in a search, to propose trials, or to begin them from.

    It is trained when it is first needed: that, and its inference, are part of what the search costs.

    Attributes:
        trainings: Length of its training, in trainings of one candidate.
        candidates: Sub-configurations that are scored by inference to propose from.
        share: Share of the trials it proposes, in [0, 1].
        warm_start: Whether trials that are sub-configurations, reference points apart, begin from its weights
            instead of random ones. Trainings with other seeds begin from an elastic adapter of their own.
            What is found so are adapters that were trained so; it goes on whatever the correlation.
        lowest_correlation: It proposes nothing while Spearman's correlation of its scores with the trained
            metric is below this.

    Raises:
        ValueError: A number is out of range, or it would do nothing.
    """

    trainings: float = 1.0
    candidates: int = 96
    share: float = 0.5
    warm_start: bool = False
    lowest_correlation: float = 0.3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.trainings) and self.trainings > 0):
            raise ValueError(f"trainings is a number above 0, got {self.trainings!r}.")
        check_whole("candidates", self.candidates, least=GENERATIONS)
        check_share("share", self.share, of="trials")
        if not isinstance(self.warm_start, bool):
            raise ValueError(f"warm_start is True or False, got {self.warm_start!r}.")
        if not self.share and not self.warm_start:
            raise ValueError("With share=0 and warm_start=False an elastic adapter does nothing.")
        if not -1 <= self.lowest_correlation <= 1:
            raise ValueError(f"lowest_correlation is in [-1, 1], got {self.lowest_correlation!r}.")

    def describe(self) -> str:
        """Say in a line what it does."""
        does = []
        if self.share:
            scored = f"from {self.candidates} scored by inference"
            does.append(f"proposes {self.share:.0%} of the trials, {scored}")
        if self.warm_start:
            does.append("gives trials their first weights")
        return f"a one-shot elastic adapter of {self.trainings:g} trainings {' and '.join(does)}"
