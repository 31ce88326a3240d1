"""Learning rates of a space: fixed or log-uniform, asked for, encoded and compared."""

from __future__ import annotations

import math
from typing import Any

from autopeft.core.configuration import Configuration
from autopeft.search_spaces.suggest_trial import SuggestTrial

LearningRate = float | tuple[float, float]
"""A fixed learning rate, or the (lowest, highest) of a log-uniform choice."""

# The rate of full fine-tuning at a hidden size of 2,000, and the power of the width with which it falls: the
# fit of tinker-cookbook (`get_lr`) to its sweeps of Llama. Qwen's power is 0.0775, whose rates are 3.2 times
# lower at a hidden size of 384 and 1.7 times higher at 4,096.
_FULL_RATE, _FITTED_WIDTH, _POWER = 5e-5, 2000, 0.781
# LoRA's rate on all linear modules, as a multiple of that of full fine-tuning: in trainings of 100 steps or
# more, and in shorter ones. Schulman et al., "LoRA Without Regret", 2025.
_LORA_FACTOR, _LORA_FACTOR_WHEN_SHORT, _SHORT = 10, 15, 100
# Narrower models have the rates of this width, 2.7e-3 in short trainings: of 1e-3, 3.2e-3 and 1e-2 the second
# was LoRA's best on MiniLM and Whisper tiny (384) and on a T5 of 128 (`benchmarks/family_rates.py`).
_NARROWEST = 384
# How far the ends of the range are from that rate, as a factor: beyond Qwen's fit either way. So it is 4.8e-5
# to 1.7e-3 at a hidden size of 4,096, about the grid of a published sweep of 35 models (4e-5 to 1e-3, best at
# 3e-4 or 1e-3 for 32 of them), and 3e-4 to 1.1e-2 at 384, where MiniLM's searches had 3e-4 to 1e-2.
_RANGE_FACTOR = 6

RATE_SPREAD = 0.5
"""Spread of the logarithm of rates that are drawn near a good one, a factor of 1.6: half a step of the grids
that are usually swept (1e-4, 3e-4, 1e-3)."""


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


def fitting_learning_rate(hidden_size: int, steps: int) -> float:
    """Return LoRA's rate for a model and a training, as published sweeps predict it.

    Args:
        hidden_size: Width of the model's hidden states.
        steps: Optimizer steps of a whole training.
    """
    factor = _LORA_FACTOR if steps >= _SHORT else _LORA_FACTOR_WHEN_SHORT
    return factor * full_learning_rate(hidden_size)


def fitting_learning_rates(hidden_size: int, steps: int) -> tuple[float, float]:
    """Return the range around `fitting_learning_rate`."""
    middle = fitting_learning_rate(hidden_size, steps)
    return float(f"{middle / _RANGE_FACTOR:.2g}"), float(f"{middle * _RANGE_FACTOR:.2g}")


def full_learning_rate(hidden_size: int) -> float:
    """Return the rate of full fine-tuning for a model of a width, as published sweeps predict it."""
    return float(_FULL_RATE * (_FITTED_WIDTH / max(hidden_size, _NARROWEST)) ** _POWER)


def learning_rate_bounds(learning_rate: LearningRate | None) -> tuple[float, float]:
    """Return (lowest, highest), which are equal where the learning rate is fixed.

    Raises:
        ValueError: It is None: it follows from a backbone and a training, which are not known yet.
    """
    if learning_rate is None:
        raise ValueError(
            "The space has no learning rates yet: use it in a Search, which knows the training, call "
            "with_learning_rates(backbone, steps), or give learning_rate=(lowest, highest)."
        )
    return (learning_rate, learning_rate) if isinstance(learning_rate, float) else learning_rate


def suggest_learning_rate(trial: SuggestTrial, learning_rate: LearningRate | None) -> float:
    """Ask for the learning rate on a log scale; three significant digits keep it readable."""
    low, high = learning_rate_bounds(learning_rate)
    if low == high:
        return low
    return readable_learning_rate(trial.suggest_float("learning_rate", low, high, log=True), low, high)


def readable_learning_rate(value: float, low: float, high: float) -> float:
    """Return a learning rate of three significant digits within bounds, which may have more."""
    readable = float(f"{value:.3g}") if low < value < high else value
    return min(max(readable, low), high)


def learning_rate_at(place: float, learning_rate: LearningRate | None) -> float:
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
