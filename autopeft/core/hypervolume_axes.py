"""The fixed axes of a search's hypervolume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis


def fixed_axes(
    objectives: Sequence[Objective],
    metric_bounds: Mapping[str, tuple[float, float]],
    ends: Sequence[Mapping[str, float]],
) -> tuple[Axis, ...]:
    """Return an axis for each objective whose ends are known before training.

    Args:
        objectives: The search's.
        metric_bounds: The trivial score and the best value of each metric among them.
        ends: What the space's smallest and its largest configuration cost.
    """
    axes = []
    for objective in objectives:
        if objective.is_metric:
            worst, best = metric_bounds[objective.name]
            axes.append(Axis(objective=objective, worst=worst, best=best))
        elif objective.before_training:
            best, worst = sorted(end[objective.name] for end in ends)
            if objective.log_scale:
                best = max(best, 1.0)  # the head alone has no adapter parameters
            if best < worst:
                axes.append(Axis(objective=objective, worst=worst, best=best))
    return tuple(axes)
