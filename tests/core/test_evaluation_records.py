from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost, CurvePoint, Evaluation, Status, TrialRecord
from tests.strategies import configurations

numbers = st.floats(allow_nan=False)
seconds = st.floats(0, 1e6)
names = st.sampled_from(("accuracy", "training_loss", "peak_memory"))


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    statuses: tuple[Status, ...] = ("complete", "failed", "infeasible")
    status = draw(st.sampled_from(statuses))
    points = st.builds(CurvePoint, metric=names, step=st.integers(0, 10**6), value=numbers)
    return Evaluation(
        configuration=draw(configurations()),
        status=status,
        reason=None if status == "complete" else draw(st.text(min_size=1)),
        values=draw(st.dictionaries(names, numbers)),
        curves=tuple(draw(st.lists(points, max_size=4))),
        cost=draw(
            st.builds(
                Cost,
                wall_seconds=seconds,
                cpu_seconds=seconds,
                gpu_seconds=seconds,
                steps=st.integers(0, 10**6),
            )
        ),
        seed=draw(st.integers(0, 2**31)),
    )


@given(
    evaluation=evaluations(),
    number=st.integers(0, 999),
    duplicate_of=st.none() | st.integers(0, 999),
    baseline=st.none() | st.text(),
)
def test_a_record_reads_back_from_json(
    evaluation: Evaluation, number: int, duplicate_of: int | None, baseline: str | None
) -> None:
    record = TrialRecord(number=number, evaluation=evaluation, duplicate_of=duplicate_of, baseline=baseline)
    assert TrialRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def test_plain_data_is_plain() -> None:
    evaluation = Evaluation(
        configuration=Configuration({Site(0, "query"): Adapter("lora", 8)}),
        status="complete",
        values={"accuracy": 0.5},
        curves=(CurvePoint(metric="accuracy", step=10, value=0.25),),
        cost=Cost(wall_seconds=1.5, steps=10),
        seed=3,
    )
    assert evaluation.to_dict() == {
        "configuration": evaluation.configuration.to_dict(),
        "status": "complete",
        "reason": None,
        "values": {"accuracy": 0.5},
        "curves": [["accuracy", 10, 0.25]],
        "cost": {"wall_seconds": 1.5, "cpu_seconds": 0.0, "gpu_seconds": 0.0, "steps": 10},
        "seed": 3,
        "fidelity": 1.0,
        "by_seed": {},
        "failures": {},
        "warm_start": False,
        "derived": [],
    }


def test_costs_add_up() -> None:
    cost = Cost(wall_seconds=1.0, cpu_seconds=2.0, gpu_seconds=3.0, steps=4)
    assert cost + Cost(wall_seconds=0.5, steps=1) == Cost(
        wall_seconds=1.5, cpu_seconds=2.0, gpu_seconds=3.0, steps=5
    )
    assert sum([cost, cost], start=Cost()) == cost + cost
