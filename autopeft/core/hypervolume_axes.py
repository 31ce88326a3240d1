"""The fixed axes of a search's hypervolume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis
from autopeft.tasks import Task


def fixed_axes(
    objectives: Sequence[Objective], task: Task, ends: Sequence[Mapping[str, float]]
) -> tuple[Axis, ...]:
    """Return an axis for each objective whose ends are known before training.

    Args:
        objectives: The search's.
        task: Says between what a metric lies.
        ends: What the space's smallest and its largest configuration cost.
    """
    axes = []
    for objective in objectives:
        if objective.is_metric:
            worst = task.trivial_score(objective.name)
            axes.append(Axis(objective=objective, worst=worst, best=task.best_score(objective.name)))
        elif objective.before_training:
            best, worst = sorted(end[objective.name] for end in ends)
            if best < worst:
                axes.append(Axis(objective=objective, worst=worst, best=best))
    return tuple(axes)
