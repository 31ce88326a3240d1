"""What a search has found so far, as its space is told it."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Constraint, Objective
from autopeft.core.pareto import Axis
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.search_spaces import History


def history_of(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    axes: Sequence[Axis],
    constraints: Sequence[Constraint],
    *,
    forecast: Forecast | None,
    is_prefix_served: bool,
    pending: Sequence[Configuration] = (),
) -> History:
    """Return every trial with the values known of it; a failed training has the worst of the metrics.

    Args:
        records: All finished and paused trials.
        objectives: The search's.
        axes: Of the hypervolume; they say what is worst.
        constraints: The search's.
        forecast: Says what paused trials are expected to reach; None where trials do not pause.
        is_prefix_served: Whether training does without running the blocks below the lowest adapted one.
        pending: What is about to be trained: tried, and nothing is known of it.
    """
    worst = {one.objective.name: one.worst for one in axes if not one.objective.before_training}
    names = [objective.name for objective in objectives]
    evaluations = [one.evaluation for one in records if one.duplicate_of is None]
    trials = []
    for evaluation in evaluations:
        values = dict(evaluation.values)
        if evaluation.status == "failed":
            values |= worst
        elif evaluation.status == "paused" and forecast is not None:
            values |= dict(zip(names, forecast.values(evaluation), strict=True))
        trials.append((evaluation.configuration, values))
    return History(
        trials=[*trials, *((one, {}) for one in pending)],
        trainings=[*(one.trainings for one in evaluations), *(1 for _ in pending)],
        axes=axes,
        constraints=constraints,
        is_prefix_served=is_prefix_served,
    )
