"""When going on with a search finds nothing."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.core.evaluation import TrialRecord
from autopeft.optimization.budget import Budget

_MOST_INFEASIBLE = 500
_MOST_DUPLICATES = 100
_MOST_ALIKE_FAILURES = 5


def is_exhausted(records: Sequence[TrialRecord], budget: Budget) -> bool:
    """Say whether nothing new is found; duplicates spend no compute, and the search would never end."""
    latest = records[-_MOST_DUPLICATES:]
    return (
        budget.trials is None
        and len(latest) == _MOST_DUPLICATES
        and all(record.duplicate_of is not None for record in latest)
    )


def raise_if_hopeless(records: Sequence[TrialRecord]) -> None:
    """Raise where it is plain that going on finds nothing: what was recorded stays.

    Raises:
        RuntimeError: All candidates failed, and alike.
        ValueError: No candidate has kept the constraints for long.
    """
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
