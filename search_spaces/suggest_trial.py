"""Where a space asks for its parameters: an Optuna trial, or one outside of any study."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class SuggestTrial(Protocol):
    """What a space uses of a trial; `optuna.trial.Trial`, `FixedTrial` and `FrozenTrial` have it."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return a whole number within bounds, both included."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number within bounds."""


class DrawnTrial:
    """A trial outside of any study: parameters that are not known are drawn evenly.

    A study with a random sampler draws the same way; asking one for a hundred parameters takes milliseconds.

    Args:
        generator: The only source of chance; without it, the first choice or the lowest number is taken.
        known: Parameters that are not drawn. More than are asked for do no harm; a number out of bounds
            becomes the nearest within them, and what is none of the choices is drawn.

    Attributes:
        params: The parameters that were asked for.
    """

    def __init__(self, generator: random.Random | None, known: Mapping[str, Any] | None = None) -> None:
        self.params: dict[str, Any] = {}
        self._known = dict(known or {})
        self._generator = generator

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        value = self._known.get(name)
        if value not in choices:
            value = choices[0] if self._generator is None else self._generator.choice(choices)
        return self._answer(name, value)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return a whole number within bounds, both included."""
        value = self._known.get(name, low)
        if name not in self._known and self._generator is not None:
            drawn = _log_uniform(self._generator, low - 0.5, high + 0.5) if log else None
            value = self._generator.randint(low, high) if drawn is None else round(drawn)
        return int(self._answer(name, min(max(value, low), high)))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number within bounds."""
        value = self._known.get(name, low)
        if name not in self._known and self._generator is not None:
            value = _log_uniform(self._generator, low, high) if log else self._generator.uniform(low, high)
        return float(self._answer(name, min(max(value, low), high)))

    def _answer(self, name: str, value: Any) -> Any:
        self.params[name] = self._known[name] = value
        return value


def _log_uniform(generator: random.Random, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))
