"""What a search has found so far, as its sampler is told it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Constraint, Objective
from autopeft.core.pareto import Axis, contributions, non_dominated
from autopeft.optimization.learning_curve_forecast import Forecast


def nothing_is_served(block: int) -> bool:
    """Say that trainings run all blocks, those below the lowest adapter too."""
    return False


@dataclass(frozen=True, kw_only=True)
class History:
    """What a search has found so far and what it is after.

    Attributes:
        trials: Configurations that were tried, each with the values known of it: all objectives of a
            complete trial, only the costs of one that broke a constraint, none of one that is being
            trained. Where a training failed, its metrics are the worst there are; where it is paused, those
            it is expected to reach.
        axes: The axes of the hypervolume.
        front: Configurations of the front, each with what it adds to the hypervolume.
        constraints: Bounds on what is exact before training.
        trainings: How many trainings the values of each trial are the means of; one each where empty.
        are_states_served: Whether trainings whose lowest adapter sits in a block (or, where it is their
            number, that have the head alone) read kept hidden states in place of running the blocks below.
    """

    trials: Sequence[tuple[Configuration, Mapping[str, float]]]
    axes: Sequence[Axis]
    front: Mapping[Configuration, float] = field(default_factory=dict)
    constraints: Sequence[Constraint] = ()
    trainings: Sequence[int] = ()
    are_states_served: Callable[[int], bool] = nothing_is_served


def history_of(
    records: Sequence[TrialRecord],
    objectives: Sequence[Objective],
    axes: Sequence[Axis],
    constraints: Sequence[Constraint],
    *,
    forecast: Forecast | None = None,
    are_states_served: Callable[[int], bool] = nothing_is_served,
    pending: Sequence[Configuration] = (),
) -> History:
    """Return every trial with the values known of it; a failed training has the worst of the metrics.

    Args:
        records: All finished and paused trials.
        objectives: The search's.
        axes: Of the hypervolume; they say what is worst.
        constraints: The search's.
        forecast: Says what paused trials are expected to reach; None where trials do not pause.
        are_states_served: See `History`.
        pending: What is being trained: tried, and nothing is known of it.
    """
    worst = {axis.objective.name: axis.worst for axis in axes if not axis.objective.before_training}
    names = [objective.name for objective in objectives]
    evaluations = [record.evaluation for record in records if record.duplicate_of is None]
    trials: list[tuple[Configuration, Mapping[str, float]]] = []
    for evaluation in evaluations:
        values = dict(evaluation.values)
        if evaluation.status == "failed":
            values |= worst
        elif evaluation.status == "paused" and forecast is not None:
            values |= dict(zip(names, forecast.values(evaluation), strict=True))
        trials.append((evaluation.configuration, values))
    complete = [evaluation for evaluation in evaluations if evaluation.status == "complete"]
    flags = non_dominated([evaluation.values for evaluation in complete], objectives)
    members = [evaluation for evaluation, flag in zip(complete, flags, strict=True) if flag]
    shares = contributions([member.values for member in members], axes)
    return History(
        trials=[*trials, *((configuration, {}) for configuration in pending)],
        axes=axes,
        front={member.configuration: share for member, share in zip(members, shares, strict=True)},
        constraints=constraints,
        trainings=[*(evaluation.trainings for evaluation in evaluations), *(1 for _ in pending)],
        are_states_served=are_states_served,
    )
