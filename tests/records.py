"""Synthetic trial records: what a search of a 12-block encoder might have recorded."""

from __future__ import annotations

import random
from collections.abc import Sequence

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost, CurvePoint, Evaluation, TrialRecord
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.core.pareto import Axis, non_dominated
from autopeft.reporting.front import ParetoFront

METRICS = (Objective.score("accuracy"), Objective.score("f1_macro"))
OBJECTIVES = resolve_objectives(("accuracy", "trainable_parameters", "peak_memory"), METRICS)
AXES = tuple(
    Axis(objective=objective, worst=worst, best=best)
    for objective, (worst, best) in zip(OBJECTIVES, ((0.2, 1.0), (1e6, 2_000.0), (4e9, 1e8)), strict=True)
)
IDENTITY = {
    "backbone": {"name": "all-MiniLM-L6-v2", "class": "BertForSequenceClassification"},
    "task": {"name": "questions", "train_examples": "4,306", "fingerprint": "5a1d"},
    "training": {"epochs": "3", "batch_size": "32"},
}


def random_configuration(random_state: random.Random, *, blocks: int = 12) -> Configuration:
    """Draw adapters of several methods on the blocks from a random one up."""
    lowest = random_state.randrange(blocks)
    adapters: dict[Site, list[Adapter]] = {}
    for block in range(lowest, blocks):
        for role in ("query", "value", "ffn_down"):
            if random_state.random() < 0.6:
                rank = random_state.choice((1, 2, 4, 8, 16, 32))
                adapters.setdefault(Site(block, role), []).append(Adapter("lora", rank))
        if random_state.random() < 0.3:
            adapters[Site(block, "ffn_norm")] = [Adapter("layernorm")]
        if random_state.random() < 0.3:
            width = random_state.choice((8, 16, 48))
            adapters[Site(block, "ffn")] = [Adapter("parallel", width)]
        if random_state.random() < 0.2:
            adapters[Site(block, "attention")] = [Adapter("prefix", 5), Adapter("series", 16)]
    return Configuration(adapters, learning_rate=10 ** random_state.uniform(-4, -2))


def completed(
    number: int,
    configuration: Configuration,
    random_state: random.Random,
    *,
    baseline: str | None = None,
    validations: int = 4,
) -> TrialRecord:
    """Make up an outcome in which cost helps, with diminishing returns and noise."""
    parameters = 2_310.0 + sum(768 * (adapter.size or 1) for _, adapter in configuration)
    lowest = 12 if configuration.lowest_block is None else configuration.lowest_block[1]
    memory = 2**20 * (380 + 110 * (12 - lowest) + random_state.random())
    accuracy = 0.93 - 0.4 * (parameters / 2_310) ** -0.35 + random_state.gauss(0, 0.02)
    curves = tuple(
        CurvePoint(metric=metric, step=10 * step, value=accuracy * (1 - 0.5**step))
        for step in range(1, validations + 1)
        for metric in ("accuracy", "training_loss")
    )
    seconds = random_state.uniform(3, 9)
    return TrialRecord(
        number=number,
        baseline=baseline,
        evaluation=Evaluation(
            configuration=configuration,
            status="complete",
            values={
                "accuracy": accuracy,
                "f1_macro": accuracy - 0.03,
                "trainable_parameters": parameters,
                "peak_memory": memory,
            },
            curves=curves,
            cost=Cost(wall_seconds=seconds, cpu_seconds=1.8 * seconds, steps=10 * validations),
            seed=0,
        ),
    )


def synthetic_records(count: int, *, seed: int = 0) -> list[TrialRecord]:
    """Make records of which the first two are baselines and every ninth did not complete."""
    random_state = random.Random(seed)
    records = []
    for number in range(count):
        configuration = random_configuration(random_state)
        baseline = {0: "head only", 1: "uniform lora 8"}.get(number)
        if number == 0:
            configuration = Configuration({})
        if number % 9 == 8:
            status, reason = (
                ("infeasible", "peak_memory 2,001.0 MiB, allowed ≤ 1,024.0 MiB")
                if number % 2
                else ("failed", "diverged: training_loss is nan at step 12")
            )
            evaluation = Evaluation(
                configuration=configuration,
                status=status,  # type: ignore[arg-type]
                reason=reason,
                values={"trainable_parameters": 9e5, "peak_memory": 2e9},
            )
            records.append(TrialRecord(number=number, evaluation=evaluation))
        else:
            records.append(completed(number, configuration, random_state, baseline=baseline))
    return records


def front_of(records: Sequence[TrialRecord], objectives: Sequence[Objective] = OBJECTIVES) -> set[int]:
    """Return the numbers of the completed trials that no other one dominates."""
    whole = [record for record in records if record.evaluation.status == "complete"]
    keep = non_dominated([record.evaluation.values for record in whole], objectives)
    return {record.number for record, kept in zip(whole, keep, strict=True) if kept}


def pareto_front(records: Sequence[TrialRecord], **names: str) -> ParetoFront:
    """Return the front of records with the three objectives."""
    return ParetoFront(records, OBJECTIVES, AXES, None, **names)
