"""Learning rates of a space: fixed or log-uniform, asked for, encoded and compared."""

from __future__ import annotations

import math
from typing import Any

from autopeft.core.configuration import Configuration
from autopeft.search_spaces.suggest_trial import SuggestTrial

LearningRate = float | tuple[float, float]
"""A fixed learning rate, or the (lowest, highest) of a log-uniform choice."""


def checked_learning_rate(learning_rate: Any) -> LearningRate:
    """Return a learning rate or a range of it; raise a ValueError where it is neither."""
    bounds = learning_rate if isinstance(learning_rate, tuple | list) else (learning_rate, learning_rate)
    numbers = [bound for bound in bounds if isinstance(bound, int | float) and not isinstance(bound, bool)]
    if len(numbers) != 2 or len(bounds) != 2:
        raise ValueError(f"learning_rate is a number, or (lowest, highest), got {learning_rate!r}.")
    low, high = map(float, numbers)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"learning_rate must be above 0 with the lowest first, got {learning_rate!r}.")
    return low if low == high else (low, high)


def learning_rate_bounds(learning_rate: LearningRate) -> tuple[float, float]:
    """Return (lowest, highest), which are equal where the learning rate is fixed."""
    return (learning_rate, learning_rate) if isinstance(learning_rate, float) else learning_rate


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


def learning_rate_at(place: float, learning_rate: LearningRate) -> float:
    """Return the learning rate at a place on the range's log scale, from 0 (lowest) to 1; two digits."""
    low, high = learning_rate_bounds(learning_rate)
    return low if low == high else min(max(float(f"{low * (high / low) ** place:.2g}"), low), high)


def log_place(value: float, low: float, high: float) -> float:
    """Return where a value lies between two others on a log scale."""
    return math.log(value / low) / (math.log(high / low) or 1.0)


def summed_learning_rate(configuration: Configuration) -> float:
    """Return the learning rate times the number of adapters, or of the head alone the learning rate.

    A step of Adam moves every weight by about the learning rate, and what adapters change in the model's
    output adds up: several learn at a rate at which one learns next to nothing (`benchmarks.surrogate`).
    """
    return configuration.learning_rate * max(1, len(configuration))
