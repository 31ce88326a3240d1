"""Whether a search found more than uniform LoRA, by what it trained itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from autopeft.core.adapter import Site
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import COST_OBJECTIVES, Objective

_PARAMETERS = COST_OBJECTIVES["trainable_parameters"]


def against_uniform_lora(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> str:
    """Say what a search has that is better than the best uniform LoRA in it, on the validation split.

    Uniform is one LoRA everywhere: at all sites of its roles that any trial adapts.
    """
    metric = next(objective for objective in objectives if objective.is_metric)
    trials = [
        record for record in records if record.evaluation.status == "complete" and record.duplicate_of is None
    ]
    sites = {site for record in trials for site in record.evaluation.configuration.adapters}
    numbers = {trial.number for trial in trials if _is_uniform(trial.evaluation.configuration, sites)}
    if not numbers:
        return "This search trained no uniform LoRA: whether its front beats one is not known."

    def score(record: TrialRecord) -> float:
        return metric.sign * record.evaluation.values[metric.name]

    uniform = max((trial for trial in trials if trial.number in numbers), key=score)
    most = uniform.evaluation.values[_PARAMETERS.name]
    better = [trial for trial in trials if trial.number not in numbers and score(trial) > score(uniform)]
    as_small = [trial for trial in better if trial.evaluation.values[_PARAMETERS.name] <= most]
    if not better:
        return f"Nothing beat uniform LoRA: take {_said(uniform, metric)}."
    best = max(as_small or better, key=score)
    comparison = f"{_said(best, metric)}{_noise(best, uniform, metric)}"
    if not as_small:
        said = f"Nothing beat uniform LoRA with as few parameters ({_said(uniform, metric)})"
        return f"{said}; with more there is {comparison}."
    return f"Uniform LoRA's best is {_said(uniform, metric)}; with no more parameters there is {comparison}."


def _is_uniform(configuration: Configuration, sites: Collection[Site]) -> bool:
    roles = {site.role for site in configuration.adapters}
    everywhere = {site for site in sites if site.role in roles}
    is_one = len({adapter for _, adapter in configuration}) == 1 and configuration.methods == ("lora",)
    lowest = configuration.lowest_block
    return is_one and lowest is not None and lowest[1] == 0 and configuration.adapters.keys() == everywhere


def _said(record: TrialRecord, metric: Objective) -> str:
    evaluation = record.evaluation
    return (
        f"trial {record.number}, {metric.name} {evaluation.format(metric)} with "
        f"{_PARAMETERS.format(evaluation.values[_PARAMETERS.name])} parameters"
    )


def _noise(best: TrialRecord, other: TrialRecord, metric: Objective) -> str:
    """Say whether standard errors over the trainings overlap; nothing where they do not."""
    evaluations = best.evaluation, other.evaluation
    deviations = [evaluation.deviation(metric) for evaluation in evaluations]
    if None in deviations:
        return " (not both were trained with several seeds: their noise is not known)"
    pairs = zip(deviations, evaluations, strict=True)
    errors = sum((deviation or 0.0) / math.sqrt(evaluation.trainings) for deviation, evaluation in pairs)
    difference = abs(evaluations[0].values[metric.name] - evaluations[1].values[metric.name])
    return ", which is within the noise (standard errors overlap)" if difference <= errors else ""
