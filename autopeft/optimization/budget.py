"""When a search is done, and when it is hopeless."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from autopeft.core.errors import check_numbers
from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.optimization.trial_records import Spent

# In a row, before a search gives up: counting so many takes minutes. Where one in a hundred is feasible,
# 0.7 % of searches end in vain.
_MOST_INFEASIBLE = 500
_MOST_DUPLICATES = 100  # in a row: where one in twenty is new, 0.6 % of searches end too early
_MOST_ALIKE_FAILURES = 5  # the first: if every other training failed by chance, 3 % of searches would end


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds of a search; it ends when one of them is reached."""

    # Finished trials of the whole search, earlier calls and failed trials included; infeasible candidates
    # cost nothing and do not count.
    trials: int | None = None
    hours: float | None = None  # wall-clock hours of this call
    gpu_seconds: float | None = None  # GPU-seconds of all evaluations of the search
    cpu_seconds: float | None = None  # CPU-seconds of all evaluations of the search
    _started: float = field(default_factory=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        if not self.bounds:
            raise ValueError(
                "A search needs a budget: trials=..., hours=..., gpu_seconds=... or cpu_seconds=..."
            )
        check_numbers(above=0, **self.bounds)
        if self.trials is not None and not float(self.trials).is_integer():
            raise ValueError(f"trials must be a whole number, got {self.trials!r}.")

    def less(self, share: float) -> Self:
        """Return what is left of hours and seconds when a share of them is kept for a verdict.

        Raises:
            ValueError: It is no share in [0, 1).
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"verdict is a share of the compute, from 0 up and below 1, got {share!r}.")
        left: dict[str, Any] = {name: bound * (1 - share) for name, bound in self.bounds.items()}
        return replace(self, **{**left, "trials": self.trials})

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by name."""
        names = ("trials", "hours", "gpu_seconds", "cpu_seconds")
        return {name: bound for name in names if (bound := getattr(self, name)) is not None}

    @property
    def bounds_compute(self) -> bool:
        """Whether there is a bound besides that of trials."""
        return self.bounds.keys() != {"trials"}

    def spent_share(self, spent: Spent, reserved: Cost | None = None, at_once: int = 1) -> float:
        """Return how much of the scarcest bound is used up; 1 or more when the search is done.

        What is reserved, as it is still to be spent on the trials, is counted as if it were spent: its time
        as that of so many trainings `at_once`.
        """
        more = Cost() if reserved is None else reserved
        elapsed = time.monotonic() - self._started + more.wall_seconds / at_once
        shares = (
            (spent.trials, self.trials),
            (elapsed, None if self.hours is None else self.hours * 3600),
            (spent.cost.gpu_seconds + more.gpu_seconds, self.gpu_seconds),
            (spent.cost.cpu_seconds + more.cpu_seconds, self.cpu_seconds),
        )
        return max(amount / bound for amount, bound in shares if bound is not None)


def is_exhausted(records: Sequence[TrialRecord], budget: Budget) -> bool:
    """Say whether nothing new is found; duplicates spend no compute, and the search would never end."""
    latest = records[-_MOST_DUPLICATES:]
    return (
        budget.trials is None
        and len(latest) == _MOST_DUPLICATES
        and all(record.duplicate_of is not None for record in latest)
    )


def raise_if_hopeless(records: Sequence[TrialRecord]) -> None:
    """Raise where it is plain that going on finds nothing: what was recorded stays."""
    if any(record.evaluation.status == "complete" for record in records[-_MOST_INFEASIBLE:]):
        return
    own = (record.evaluation for record in records if record.duplicate_of is None)
    evaluated = [evaluation for evaluation in own if evaluation.status != "infeasible"]
    outcomes = {(evaluation.status, evaluation.reason) for evaluation in evaluated}
    alike = len(outcomes) == 1 and evaluated[0].status == "failed"
    if alike and len(evaluated) >= _MOST_ALIKE_FAILURES:
        raise RuntimeError(
            f"All {len(evaluated)} candidates so far failed alike: {evaluated[0].reason}. Mend that, and "
            "try them again with run(..., retry_failed=True)."
        )
    latest = records[-_MOST_INFEASIBLE:]
    infeasible = all(record.evaluation.status == "infeasible" for record in reversed(latest))
    if len(latest) == _MOST_INFEASIBLE and infeasible:
        raise ValueError(
            f"{_MOST_INFEASIBLE} candidates in a row broke a constraint (the last: "
            f"{latest[-1].evaluation.reason}): relax the constraints, or make the space smaller."
        )
