"""Scheduler: what is done next, from the records and what is running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from autopeft import SuccessiveHalving
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New, Replicate, Resume
from autopeft.optimization.budget import Budget
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.scheduler import Scheduler
from autopeft.optimization.successive_halving import AshaPromoter
from autopeft.optimization.trial_records import TrialRecords
from tests.optimization.test_promotion import AXES, HALVING, OBJECTIVES, RUNGS, trial


def configuration(rank: int) -> Configuration:
    return Configuration({Site(0, "query"): Adapter("lora", rank)})


class Ranks:
    """Proposes LoRA of the ranks given, in their order; by default of the number's."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks
        self.pending: list[int] = []

    def __call__(
        self, number: int, records: Sequence[TrialRecord], pending: Sequence[Configuration] = ()
    ) -> Proposal:
        self.pending.append(len(pending))
        rank = self.ranks[number] if number < len(self.ranks) else number + 1
        return Proposal(configuration=configuration(rank), params={"rank": rank}, distributions={})


def known(records: Sequence[TrialRecord]) -> TrialRecords:
    return TrialRecords(OBJECTIVES, records)


def scheduler(
    budget: Budget, *ranks: int, halving: SuccessiveHalving | None = None, **options: Any
) -> Scheduler:
    promoter = None
    if halving is not None:
        promoter = AshaPromoter(halving, RUNGS, OBJECTIVES, AXES, OBJECTIVES[0])
    return Scheduler(Ranks(*ranks), budget, OBJECTIVES, promoter=promoter, **options)


def done(job: Job, accuracy: float = 0.5, parameters: float = 1e3) -> TrialRecord:
    """Return a whole training as the record of a job."""
    if isinstance(job, Duplicate):
        evaluation = job.original.evaluation
        return TrialRecord(number=job.number, evaluation=evaluation, duplicate_of=job.original.number)
    record = trial(job.number, parameters, accuracy, accuracy, accuracy)
    if isinstance(job, New):
        record = replace(record, evaluation=replace(record.evaluation, configuration=job.configuration))
    return record


def test_new_trials_fill_the_free_places_and_the_budget() -> None:
    made = scheduler(Budget(trials=5))
    jobs = made.next(known([]), 3)
    assert [job.number for job in jobs] == [0, 1, 2]
    assert all(isinstance(job, New) and job.rung is None for job in jobs)
    assert made.next(known([]), 0) == []
    records = [done(jobs[2])]  # the others are not over
    made.finished(records[0])
    assert [job.number for job in made.next(known(records), 4)] == [3, 4], "five in all, finished and running"
    assert sorted(made.running) == [0, 1, 3, 4]


def test_the_proposer_is_told_what_is_pending_and_gives_what_is_recorded() -> None:
    proposer = Ranks()
    made = Scheduler(proposer, Budget(trials=9), OBJECTIVES)
    jobs = made.next(known([]), 3)
    assert proposer.pending == [0, 1, 2]
    proposal = made.finished(done(jobs[1]))
    assert proposal is not None
    assert proposal.params == {"rank": 2}
    assert made.finished(done(jobs[1])) is None, "known by now: nothing new was proposed for it"


def test_gaps_of_a_search_that_was_interrupted_are_filled_first() -> None:
    records = [done(New(number=number, configuration=configuration(number + 1))) for number in (0, 2, 5)]
    assert [job.number for job in scheduler(Budget(trials=9)).next(known(records), 4)] == [1, 3, 4, 6]


def test_what_was_tried_is_not_trained_again() -> None:
    made = scheduler(Budget(trials=4), 1, 1, 2)
    (first,) = made.next(known([]), 1)
    records = [done(first)]
    made.finished(records[0])
    (second,) = made.next(known(records), 1)
    assert isinstance(second, Duplicate)
    assert second.original is records[0]
    records.append(done(second))
    made.finished(records[1])
    (third,) = made.next(known(records), 1)
    assert isinstance(third, New)


def test_while_another_trial_trains_the_same_the_next_ones_begin() -> None:
    made = scheduler(Budget(trials=5), 1, 1, 2, 1, 3)
    first, *others = made.next(known([]), 3)
    assert [(job.number, isinstance(job, New)) for job in others] == [(2, True), (4, True)]
    assert made.next(known([]), 3) == [], "five in all, those that are held back included"
    records = [done(others[0])]
    made.finished(records[0])
    assert made.next(known(records), 3) == [], "what they try is still being trained"
    records.insert(0, done(first))
    made.finished(records[0])
    twins = made.next(known(records), 3)
    assert all(isinstance(job, Duplicate) and job.original is records[0] for job in twins)
    assert [job.number for job in twins] == [1, 3]


def test_what_is_held_back_is_trained_where_the_other_has_failed() -> None:
    made = scheduler(Budget(trials=3), 1, 1, 1)
    (first,) = made.next(known([]), 3)
    record = done(first)
    failed = replace(record, evaluation=replace(record.evaluation, status="failed", reason="lost"))
    made.finished(failed)
    (second,) = made.next(known([failed]), 3)
    assert (second.number, isinstance(second, New)) == (1, True), "and the third waits for the second"


def test_few_trials_are_held_back_however_small_the_space_is() -> None:
    proposer = Ranks(*[1] * 200)
    made = Scheduler(proposer, Budget(cpu_seconds=9), OBJECTIVES)
    for _ in range(3):
        assert len(made.next(known([]), 8)) <= 1
    assert len(proposer.pending) == 3, "one is trained, two are held back"


def test_a_search_of_several_workers_that_is_killed_ends_as_if_it_had_not_been() -> None:
    """A trial that was held back has left nothing: its number is proposed again."""
    ranks = (1, 1, 2, 1, 3, 2, 4, 4)

    def run(made: Scheduler, records: list[TrialRecord], jobs: int) -> list[TrialRecord]:
        """Let the oldest of three jobs end, so often."""
        for _ in range(jobs):
            made.next(known(records), 3 - len(made.running))
            if made.running:
                record = done(next(iter(made.running.values())))
                made.finished(record)
                records = sorted([*records, record], key=lambda known: known.number)
        return records

    def outcomes(records: list[TrialRecord]) -> list[tuple[int, Configuration]]:
        return [(record.number, record.evaluation.configuration) for record in records]

    whole = run(scheduler(Budget(trials=8), *ranks), [], 9)
    assert [record.number for record in whole] == [*range(8)]
    assert sum(record.duplicate_of is None for record in whole) == len(set(ranks))
    for killed in range(8):
        left = run(scheduler(Budget(trials=8), *ranks), [], killed)
        assert outcomes(run(scheduler(Budget(trials=8), *ranks), left, 9)) == outcomes(whole)


def test_a_configuration_that_failed_may_be_tried_again() -> None:
    made = scheduler(Budget(trials=3), 1, 1)
    (first,) = made.next(known([]), 1)
    record = done(first)
    failed = replace(record, evaluation=replace(record.evaluation, status="failed", reason="lost"))
    made.finished(failed)
    (second,) = made.next(known([failed]), 1)
    assert isinstance(second, New)


def test_a_paused_trial_in_flight_is_not_handed_out_twice() -> None:
    made = scheduler(Budget(trials=2), halving=HALVING)
    records = [trial(0, 1e3, 0.5), trial(1, 2e3, 0.9)]
    (first,) = made.next(known(records), 1)
    assert isinstance(first, Resume)
    assert first.record is records[first.number]
    others = made.next(known(records), 4)
    assert first.number not in [job.number for job in others]
    assert all(isinstance(job, Resume) for job in others)


def test_failed_trials_are_tried_again_on_request_whatever_the_budget_of_trials() -> None:
    record = trial(0, 1e3, 0.5, 0.5, 0.5)
    failed = replace(record, evaluation=replace(record.evaluation, status="failed", reason="a bug"))
    assert scheduler(Budget(trials=1)).next(known([failed]), 1) == []
    made = scheduler(Budget(trials=1), retried=[0], halving=HALVING)
    (job,) = made.next(known([failed]), 1)
    assert job == New(number=0, configuration=record.evaluation.configuration, rung=0, failed=failed)
    made.finished(failed)
    assert made.next(known([failed]), 1) == [], "once in a call"


def test_members_of_the_front_are_replicated_once_at_a_time() -> None:
    made = scheduler(Budget(trials=1), seeds=2)
    records = [trial(0, 1e3, 0.5, 0.5, 0.5)]
    assert made.next(known(records), 2) == [Replicate(record=records[0], training=1)]
    assert made.next(known(records), 2) == []


def paused_search(budget: Budget) -> tuple[Scheduler, list[TrialRecord]]:
    """Return a search whose one whole trial is the head alone, and that is to leave three others paused."""
    halving = SuccessiveHalving(rungs=(1 / 9, 1 / 3), reduction_factor=12)
    records = [trial(0, 1e2, 0.3, 0.3, 0.3)]
    records += [trial(number, 10.0 ** (number + 1), 0.4 + 0.1 * number) for number in (1, 2, 3)]
    evaluations = [record.evaluation for record in records]
    records = [
        replace(record, evaluation=replace(evaluation, cost=replace(evaluation.cost, cpu_seconds=1.0)))
        for record, evaluation in zip(records, evaluations, strict=True)
    ]
    return scheduler(budget, halving=halving), records


def test_promising_paused_trials_are_trained_on_when_all_trials_are_begun() -> None:
    made, records = paused_search(Budget(trials=4))
    jobs = made.next(known(records), 9)
    assert all(isinstance(job, Resume) for job in jobs)
    assert {job.number for job in jobs} == {1, 2, 3}


def test_a_budget_of_compute_keeps_enough_for_promising_paused_trials() -> None:
    """Each has had 1 s of 9: beside the one that goes on anyway, two need 16 s, and 4 s were spent."""
    for seconds, expected in ((21.0, New), (19.0, Resume)):
        made, records = paused_search(Budget(cpu_seconds=seconds))
        (promoted,) = made.next(known(records), 1)
        assert isinstance(promoted, Resume)
        (job,) = made.next(known(records), 1)
        assert isinstance(job, expected)


def test_what_cannot_be_trained_on_is_named() -> None:
    made, records = paused_search(Budget(cpu_seconds=1.0))
    assert made.next(known(records), 1) == []
    assert sorted((record.number, rung) for record, rung in made.promising(known(records))) == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]


@pytest.mark.parametrize("budget", [Budget(trials=3), Budget(cpu_seconds=0.1)])
def test_a_search_that_is_done_has_no_jobs(budget: Budget) -> None:
    made = scheduler(budget)
    jobs = scheduler(Budget(trials=3)).next(known([]), 3)
    records = [done(job) for job in jobs]
    cost = Cost(cpu_seconds=1, steps=90)
    records = [replace(record, evaluation=replace(record.evaluation, cost=cost)) for record in records]
    assert made.next(known(records), 3) == []
    assert budget.spent_share(made.spent(known(records))) >= 1


def test_hours_that_are_kept_for_replicates_are_shared_by_all_workers() -> None:
    """Two further trainings of the only member take 2 h of 1, and half an hour of four workers."""
    made = scheduler(Budget(hours=1), seeds=3)
    (first,) = made.next(known([]), 1)
    record = done(first)
    cost = Cost(wall_seconds=3600, steps=90)
    record = replace(record, evaluation=replace(record.evaluation, cost=cost))
    made.finished(record)
    (job,) = made.next(known([record]), 1, at_once=4)
    assert isinstance(job, New)
    (job,) = made.next(known([record]), 1, at_once=1)
    assert isinstance(job, Replicate)
