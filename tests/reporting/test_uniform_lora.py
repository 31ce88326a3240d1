"""What a search says of uniform LoRA: whether its own trials beat the best that it trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Evaluation, TrialRecord, deviation_of
from autopeft.core.objectives import GENERATION_SPEEDS, Objective, resolve_objectives
from autopeft.core.pareto import Axis
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.mlflow.run_content import front_markdown
from autopeft.reporting.uniform_lora import against_uniform_lora
from tests.records import OBJECTIVES

UNIFORM = Configuration(
    {Site(block, role): Adapter("lora", 8) for block in (0, 1) for role in ("query", "value")}
)
TOP = Configuration({Site(1, role): Adapter("lora", 8) for role in ("query", "value")})
MIXED = UNIFORM.replace(adapters={**UNIFORM.adapters, Site(1, "value"): Adapter("lora", 2)})
HEAD = Configuration()


def trial(
    number: int,
    configuration: Configuration,
    score: float,
    parameters: float,
    *,
    deviation: float | None = 0.001,
    metric: str = "accuracy",
    **changes: Any,
) -> TrialRecord:
    values = {metric: score, "trainable_parameters": parameters, "peak_memory": 2**20}
    by_seed = {seed: values for seed in range(3)} if deviation is not None else {}
    spread = {} if deviation is None else {deviation_of(metric): deviation}
    evaluation = Evaluation(
        configuration=configuration, status="complete", values={**values, **spread}, by_seed=by_seed
    )
    return replace(TrialRecord(number=number, evaluation=evaluation), **changes)


AXES = (Axis(objective=OBJECTIVES[0], worst=0.0, best=1.0),)
BASE = [trial(0, HEAD, 0.4, 2e3), trial(1, UNIFORM, 0.88, 1.475e5)]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "Nothing beat uniform LoRA: take trial 1, accuracy 0.8800 ± 0.0010 with 147.5 k parameters."),
        ([trial(2, TOP, 0.87, 7e4)], "Nothing beat uniform LoRA: take trial 1"),
        (
            [trial(2, TOP, 0.89, 7e4), trial(3, MIXED, 0.885, 1e5)],
            "Uniform LoRA's best is trial 1, accuracy 0.8800 ± 0.0010 with 147.5 k parameters; with no more "
            "parameters there is trial 2, accuracy 0.8900 ± 0.0010 with 70.0 k parameters.",
        ),
        (
            [trial(2, MIXED, 0.89, 2e5)],
            "Nothing beat uniform LoRA with as few parameters (trial 1, accuracy 0.8800 ± 0.0010 with "
            "147.5 k parameters); with more there is trial 2, accuracy 0.8900 ± 0.0010 with "
            "200.0 k parameters.",
        ),
        ([trial(2, TOP, 0.89, 7e4, duplicate_of=1)], "Nothing beat uniform LoRA: take trial 1"),
    ],
)
def test_the_best_is_compared_with_the_best_uniform_lora(others: list[TrialRecord], said: str) -> None:
    found = against_uniform_lora([*BASE, *others], OBJECTIVES)
    assert found.startswith(said)
    assert "noise" not in found


def test_what_may_be_luck_is_said_to_be() -> None:
    close = trial(2, TOP, 0.881, 7e4)
    assert "within the noise" in against_uniform_lora([*BASE, close], OBJECTIVES)
    once = trial(2, TOP, 0.95, 7e4, deviation=None)
    assert "their noise is not known" in against_uniform_lora([*BASE, once], OBJECTIVES)


def test_a_part_of_the_model_is_not_uniform() -> None:
    seen = "This search trained no uniform LoRA"
    everywhere = trial(3, MIXED, 0.8, 1e5)  # shows which sites there are
    for configuration in (TOP, MIXED, HEAD):
        assert against_uniform_lora([trial(2, configuration, 0.8, 1e5), everywhere], OBJECTIVES).startswith(
            seen
        )
    lower = UNIFORM.replace(adapters={Site(0, "query"): Adapter("lora", 8)})
    assert against_uniform_lora([trial(2, lower, 0.8, 1e5), everywhere], OBJECTIVES).startswith(seen)
    one_role = {Site(block, "query"): Adapter("lora", 8) for block in (0, 1)}
    found = against_uniform_lora([trial(2, Configuration(one_role), 0.9, 1e5), everywhere], OBJECTIVES)
    assert found.startswith("Nothing beat uniform LoRA: take trial 2")


def test_a_loss_is_better_when_smaller() -> None:
    loss = Objective(name="loss", direction="minimize", unit="nats", is_metric=True)
    records = [trial(1, UNIFORM, 2.0, 1e5, metric="loss"), trial(2, TOP, 1.5, 5e4, metric="loss")]
    objectives = resolve_objectives(("loss", "trainable_parameters"), (loss,))
    assert "there is trial 2, loss 1.5000" in against_uniform_lora(records, objectives)


def test_tables_and_notes_say_it() -> None:
    said = against_uniform_lora(BASE, OBJECTIVES)
    front = ParetoFront(BASE, OBJECTIVES, AXES)
    assert " ".join(said.split()) in " ".join(repr(front).split())
    assert said in front._repr_html_()
    assert said in front_markdown(BASE, {0, 1}, OBJECTIVES)
    assert "uniform LoRA" not in repr(ParetoFront([], OBJECTIVES, AXES))


def test_the_head_alone_is_told_from_the_untrained_model() -> None:
    untrained = trial(2, HEAD, 0.1, 0)
    shown = repr(ParetoFront([*BASE, untrained], OBJECTIVES[:2], AXES))
    methods = {
        line.split("│")[1].strip(): line.split("│")[4].strip() for line in shown.splitlines() if "│" in line
    }
    assert (methods["0"], methods["2"]) == ("head alone", "no adapter")


def test_what_costs_least_comes_first_of_speeds_too() -> None:
    speed = GENERATION_SPEEDS["tokens_per_second"]
    records = [trial(number, HEAD, score, 1e3) for number, score in enumerate((0.5, 0.7, 0.6))]
    for record, tokens in zip(records, (30.0, 10.0, 20.0), strict=True):
        record.evaluation.values["tokens_per_second"] = tokens  # type: ignore[index]
    front = ParetoFront(records, (OBJECTIVES[0], speed), AXES)
    assert [point.number for point in front] == [0, 2, 1]
