"""Where a space asks for its parameters: an Optuna trial, or one outside of any study."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
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
        generator: The only source of chance.
        known: Parameters that are not drawn.
    """

    def __init__(self, generator: random.Random, known: Mapping[str, Any] | None = None) -> None:
        self.params: dict[str, Any] = dict(known or {})
        self._generator = generator

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        return self._asked(name, lambda: self._generator.choice(choices))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """Return a whole number within bounds, both included."""

        def draw() -> int:
            if not log:
                return self._generator.randint(low, high)
            return min(max(round(self._log_uniform(low - 0.5, high + 0.5)), low), high)

        return int(self._asked(name, draw))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number within bounds."""
        draw = self._log_uniform if log else self._generator.uniform
        return float(self._asked(name, lambda: draw(low, high)))

    def _asked(self, name: str, draw: Callable[[], Any]) -> Any:
        if name not in self.params:
            self.params[name] = draw()
        return self.params[name]

    def _log_uniform(self, low: float, high: float) -> float:
        drawn = math.exp(self._generator.uniform(math.log(low), math.log(high)))
        return min(max(drawn, low), high)
