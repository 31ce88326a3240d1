"""Baseline configurations: points of a space that a search tries before it samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autopeft.core.configuration import Configuration

_LARGEST_SHARE = 4  # baselines are at most a quarter of the trials
_FEWEST = 2  # the head alone says what adapters add, the smallest one that they add anything


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A point of a space that a search tries before it samples.

    Attributes:
        name: What it stands for, as in "lora(8) everywhere".
        configuration: The point.
        is_trained_whole: Whether rungs train it to the end whatever it promises there.
    """

    name: str
    configuration: Configuration
    is_trained_whole: bool = True


def chosen_baselines(baselines: Iterable[Baseline], trials: int | None) -> tuple[Baseline, ...]:
    """Return the baselines that a budget has room for, each configuration once.

    Args:
        baselines: The cheapest and most informative first.
        trials: Trials of the budget, of which at most a quarter are baselines, but two at least; None for no
            bound.
    """
    found: dict[Configuration, Baseline] = {}
    for baseline in baselines:
        found.setdefault(baseline.configuration, baseline)
    room = len(found) if trials is None else max(_FEWEST, trials // _LARGEST_SHARE)
    return tuple(found.values())[:room]
