"""The trials of a search as a table."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import pandas as pd

from autopeft.core.evaluation import TrialRecord, deviation_of
from autopeft.core.objectives import Objective


def front_frame(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> pd.DataFrame:
    """Return all trials as a table, a row a trial.

    Args:
        records: The search's trials.
        members: Numbers of the trials on the front.
        objectives: Their values become columns, in their own units (memory in bytes); NaN where a
            trial has none. A metric has its standard deviation over the trainings beside it, where there
            were several.
    """
    names = [objective.name for objective in objectives]
    rows = []
    for record in sorted(records, key=lambda record: record.number):
        evaluation = record.evaluation
        configuration = evaluation.configuration
        rows.append(
            {
                "trial": record.number,
                "front": record.number in members,
                "status": evaluation.status,
                **{name: evaluation.values.get(name, math.nan) for name in names},
                **{deviation_of(objective.name): _deviation(record, objective) for objective in objectives},
                "methods": "+".join(configuration.methods),
                "adapters": len(configuration),
                "lowest_block": configuration.lowest_block,
                "learning_rate": configuration.learning_rate,
                "weight_decay": configuration.weight_decay,
                "seed": evaluation.seed,
                "warm_start": evaluation.warm_start,
                "trainings": evaluation.trainings,
                "wall_seconds": evaluation.cost.wall_seconds,
                "reference": record.baseline,
                "duplicate_of": record.duplicate_of,
                "reason": evaluation.reason,
                "configuration": configuration.key,
            }
        )
    frame = pd.DataFrame(rows, columns=_columns(objectives))
    # Otherwise a column of numbers with a gap would be shown as 3.0, and one of gaps as NaN.
    return frame.astype({"front": bool, "lowest_block": "Int64", "duplicate_of": "Int64"})


def _deviation(record: TrialRecord, objective: Objective) -> float:
    deviation = record.evaluation.deviation(objective)
    return math.nan if deviation is None else deviation


def _columns(objectives: Sequence[Objective]) -> list[str]:
    return [
        *("trial", "front", "status", *(objective.name for objective in objectives)),
        *(deviation_of(objective.name) for objective in objectives if objective.is_metric),
        *("methods", "adapters", "lowest_block", "learning_rate", "weight_decay", "seed", "warm_start"),
        *("trainings", "wall_seconds", "reference", "duplicate_of", "reason", "configuration"),
    ]
