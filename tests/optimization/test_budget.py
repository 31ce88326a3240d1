"""Budget: what counts, and when a search is done."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from autopeft.core.evaluation import Cost, Evaluation, Status, TrialRecord
from autopeft.optimization.budget import Budget
from autopeft.optimization.trial_records import Spent
from tests.records import random_configuration

CONFIGURATION = random_configuration(random.Random(0))


def record(number: int, status: Status = "complete", *, duplicate_of: int | None = None) -> TrialRecord:
    return TrialRecord(
        number=number,
        duplicate_of=duplicate_of,
        evaluation=Evaluation(
            configuration=CONFIGURATION,
            status=status,
            reason=None if status == "complete" else "a reason",
            cost=Cost(wall_seconds=2, cpu_seconds=4, gpu_seconds=1, steps=10),
        ),
    )


RECORDS = [record(0), record(1, "failed"), record(2, "infeasible"), record(3, duplicate_of=0)]


def test_infeasible_trials_do_not_count() -> None:
    assert Spent.of(RECORDS).trials == 3
    assert Spent.of([]).trials == 0


def test_a_duplicate_cost_nothing() -> None:
    assert Spent.of(RECORDS).cost == Cost(wall_seconds=6, cpu_seconds=12, gpu_seconds=3, steps=30)
    assert Spent.of([]).cost == Cost()


def test_trials_are_shared_out() -> None:
    budget = Budget(trials=6)
    assert budget.spent_share(Spent.of([])) == 0
    assert budget.spent_share(Spent.of(RECORDS)) == 0.5
    assert Budget(trials=3).spent_share(Spent.of(RECORDS)) == 1


def test_the_scarcest_bound_decides() -> None:
    assert Budget(trials=6, cpu_seconds=16).spent_share(Spent.of(RECORDS)) == 0.75
    assert Budget(trials=3, cpu_seconds=1600).spent_share(Spent.of(RECORDS)) == 1


def test_hours_run_from_the_call() -> None:
    budget = Budget(hours=0.05 / 3600)
    assert budget.spent_share(Spent.of(RECORDS)) < 1
    time.sleep(0.06)
    assert budget.spent_share(Spent.of([])) > 1


def test_gpu_seconds_are_shared_out() -> None:
    assert Budget(gpu_seconds=6).spent_share(Spent.of(RECORDS)) == 0.5


def test_no_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"needs a budget: trials=.*hours=.*gpu_seconds=.*cpu_seconds="):
        Budget()


@pytest.mark.parametrize("name", ["trials", "hours", "gpu_seconds", "cpu_seconds"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("-inf"), "ten", True])
def test_a_bound_is_a_number_above_zero(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*above 0, got {value!r}"):
        Budget(**{name: value})


def test_trials_are_whole() -> None:
    with pytest.raises(ValueError, match=r"trials must be .*whole.*2\.5"):
        Budget(trials=2.5)  # type: ignore[arg-type]
