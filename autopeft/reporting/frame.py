"""The trials of a search as a table."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import pandas as pd

from autopeft.core.adapter import Place, place_name
from autopeft.core.evaluation import TrialRecord, deviation_of
from autopeft.core.objectives import Objective


def front_frame(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> pd.DataFrame:
    """Return all trials as a table, a row a trial; `members` are the numbers of those on the front.

    Values of objectives are in their own units (memory in bytes), NaN where a trial has none. A metric has
    its standard deviation over the trainings beside it, where there were several.
    """
    records = sorted(records, key=lambda record: record.number)
    evaluations = [record.evaluation for record in records]
    configurations = [evaluation.configuration for evaluation in evaluations]
    names = [objective.name for objective in objectives]
    metrics = {deviation_of(objective.name): objective for objective in objectives if objective.is_metric}
    columns: dict[str, list[object]] = {
        "trial": [record.number for record in records],
        "front": [record.number in members for record in records],
        "status": [evaluation.status for evaluation in evaluations],
        **{name: [evaluation.values.get(name, math.nan) for evaluation in evaluations] for name in names},
        **{key: [each.deviation(metric) for each in evaluations] for key, metric in metrics.items()},
        "methods": ["+".join(configuration.methods) for configuration in configurations],
        "adapters": [len(configuration) for configuration in configurations],
        "lowest_block": [_block(configuration.lowest_block) for configuration in configurations],
        "learning_rate": [configuration.learning_rate for configuration in configurations],
        "weight_decay": [configuration.weight_decay for configuration in configurations],
        "allocation": [configuration.allocation for configuration in configurations],
        "seed": [evaluation.seed for evaluation in evaluations],
        "warm_start": [evaluation.warm_start for evaluation in evaluations],
        "trainings": [evaluation.trainings for evaluation in evaluations],
        "wall_seconds": [evaluation.cost.wall_seconds for evaluation in evaluations],
        "baseline": [record.baseline for record in records],
        "duplicate_of": [record.duplicate_of for record in records],
        "derived_from": [record.derived_from for record in records],
        "reason": [evaluation.reason for evaluation in evaluations],
        "configuration": [configuration.key for configuration in configurations],
    }
    # Otherwise a column of numbers with a gap would be shown as 3.0, and one of gaps as NaN.
    frame = pd.DataFrame(columns).astype(dict.fromkeys(metrics, float))
    frame["lowest_block"] = frame["lowest_block"].convert_dtypes()
    return frame.astype({"front": bool, "duplicate_of": "Int64", "derived_from": "Int64"})


def _block(place: Place | None) -> int | str | None:
    """Return the number of a block, or its name where there are several stacks."""
    return place_name(place) if place and place[0] else place and place[1]
