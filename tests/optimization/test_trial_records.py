"""What is kept up to date of a search's trials is what looking at all of them would give."""

from __future__ import annotations

import random
from dataclasses import replace

from autopeft.core.evaluation import Cost, Evaluation, TrialRecord, with_replicate
from autopeft.core.pareto import front_records
from autopeft.optimization.trial_records import Spent, TrialRecords
from tests.optimization.test_promotion import OBJECTIVES, trial


def drawn(number: int, draw: random.Random, *, paused: bool = False) -> TrialRecord:
    """Make a trial up, one of eight configurations, and what was derived from it."""
    accuracies = [draw.random() for _ in range(1 if paused else 3)]
    record = trial(number, 10.0 ** draw.randrange(3, 7), *accuracies)
    evaluation = replace(
        record.evaluation,
        configuration=trial(draw.randrange(8), 1.0, 0.5).evaluation.configuration,
        cost=Cost(wall_seconds=draw.randrange(9), steps=draw.randrange(9)),
    )
    if draw.random() < 0.3 and not paused:
        values = {**evaluation.values, "accuracy": draw.random(), "trainable_parameters": 5e2}
        evaluation = replace(evaluation, derived=(replace(evaluation, values=values, curves=()),))
    baseline = f"baseline {number}" if draw.random() < 0.2 else None
    return replace(record, evaluation=evaluation, baseline=baseline)


def changed(record: TrialRecord, draw: random.Random) -> TrialRecord:
    """Return what may become of a trial: paused ones end or fail, complete ones are trained again."""
    if record.duplicate_of is not None or record.evaluation.status == "failed":
        return record
    other = replace(drawn(record.number, draw).evaluation, configuration=record.evaluation.configuration)
    if record.evaluation.status == "paused":
        lost = Evaluation(configuration=other.configuration, status="failed", reason="lost", cost=other.cost)
        return replace(record, evaluation=lost if draw.random() < 0.3 else other)
    other = replace(other, seed=record.evaluation.trainings, derived=())
    return replace(record, evaluation=with_replicate(record.evaluation, other, {"accuracy": 0.0}))


def test_all_is_as_if_every_record_had_been_looked_at_whatever_their_order() -> None:
    draw, fronts = random.Random(0), set()
    records, known = TrialRecords(OBJECTIVES), dict[int, TrialRecord]()
    numbers = list(range(60))
    draw.shuffle(numbers)
    for number in numbers:
        record = drawn(number, draw, paused=draw.random() < 0.4)
        same = records.tried(record.evaluation.configuration.key)
        if same is not None and draw.random() < 0.5:
            record = TrialRecord(number=number, evaluation=same.evaluation, duplicate_of=same.number)
        again = changed(draw.choice([*known.values(), record]), draw)
        for new in (record, again) if again.number in known else (record,):
            records.put(new)
            known[new.number] = new
        ordered = [known[each] for each in sorted(known)]
        own = [each for each in ordered if each.duplicate_of is None]
        assert list(records) == ordered
        assert records[-2:] == ordered[-2:]
        assert records.numbered(number) is known[number]
        assert records.spent == Spent.of(ordered)
        assert records.baselines == {each.baseline for each in ordered} - {None}
        latest = {each.evaluation.configuration.key: each for each in own}
        assert all(records.tried(key) is each for key, each in latest.items())
        front = sorted(point.number for point in records.front())
        points = [point for each in ordered for point in each.points]
        assert front == sorted(point.number for point in front_records(points, OBJECTIVES))
        fronts.add(tuple(front))
    assert len(fronts) > 10
    assert records.numbered(60) is None
    assert records.tried("never") is None
