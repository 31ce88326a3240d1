"""When a search is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from autopeft.evaluation import Cost, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds of a search; it ends when one of them is reached.

    Attributes:
        trials: Finished trials of the whole search, earlier calls and failed trials included;
            infeasible candidates cost nothing and do not count.
        hours: Wall-clock hours of this call.
        gpu_seconds: GPU-seconds of all evaluations of the search.
        cpu_seconds: CPU-seconds of all evaluations of the search.

    Raises:
        ValueError: No bound is given, one is not above 0, or GPU-seconds are asked for without a GPU.
    """

    trials: int | None = None
    hours: float | None = None
    gpu_seconds: float | None = None
    cpu_seconds: float | None = None
    _started: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        bounds = (self.trials, self.hours, self.gpu_seconds, self.cpu_seconds)
        if all(bound is None for bound in bounds):
            raise ValueError(
                "A search needs a budget: trials=..., hours=..., gpu_seconds=... or cpu_seconds=..."
            )
        for name in ("trials", "hours", "gpu_seconds", "cpu_seconds"):
            bound = getattr(self, name)
            number = isinstance(bound, int | float) and not isinstance(bound, bool)
            if bound is not None and not (number and bound > 0):
                raise ValueError(f"{name} must be a number above 0, got {bound!r}.")
        if self.trials is not None and not float(self.trials).is_integer():
            raise ValueError(f"trials must be a whole number, got {self.trials!r}.")
        if self.gpu_seconds is not None and not torch.cuda.is_available():
            raise ValueError("gpu_seconds is given, but torch sees no CUDA device.")

    def spent_share(self, records: Sequence[TrialRecord]) -> float:
        """Return how much of the scarcest bound is used up; 1 or more when the search is done."""
        cost = total_cost(records)
        counted = counted_trials(records)
        shares = (
            (counted, self.trials),
            (time.monotonic() - self._started, None if self.hours is None else self.hours * 3600),
            (cost.gpu_seconds, self.gpu_seconds),
            (cost.cpu_seconds, self.cpu_seconds),
        )
        return max(spent / bound for spent, bound in shares if bound is not None)


def counted_trials(records: Sequence[TrialRecord]) -> int:
    """Return the number of trials a budget counts: all but the infeasible ones."""
    return sum(record.evaluation.status != "infeasible" for record in records)


def total_cost(records: Sequence[TrialRecord]) -> Cost:
    """Return what all evaluations cost; a duplicate cost nothing."""
    costs = (record.evaluation.cost for record in records if record.duplicate_of is None)
    return sum(costs, Cost())
