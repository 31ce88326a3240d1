"""What is done next: a member of the front is trained again, a paused trial goes on, or a new one begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import count

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New, Replicate, Resume, Rivals
from autopeft.core.objectives import Objective
from autopeft.core.profiling import section
from autopeft.evaluation.warm_start import WarmStarts
from autopeft.optimization.budget import Budget, is_exhausted
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.seed_replication import cost_of_replicates, next_to_replicate, under_replicated
from autopeft.optimization.successive_halving import AshaPromoter
from autopeft.optimization.trial_records import Spent, TrialRecords

Propose = Callable[[int, TrialRecords, Sequence[Configuration]], Proposal]
"""Says what a new trial tries, from its number, all records and what is being trained for the first time; the
same arguments give the same."""


@dataclass
class Scheduler:
    """Decides what is done next, from the records and what is running.

    In this order: failed trials are tried again, on request; members of the front are trained with further
    seeds; promoted trials go on from their rung; new trials begin. Before a budget ends, enough of it is kept
    for the trainings that members of the front lack, and for paused trials that are expected to come onto it.
    The same records give the same jobs, if one job runs at a time.
    """

    propose: Propose
    budget: Budget
    objectives: Sequence[Objective]
    _: KW_ONLY
    seeds: int = 1  # trainings that a member of the front is to have
    promoter: AshaPromoter | None = None  # says which paused trial goes on; None where trials do not pause
    overhead: WarmStarts | None = None  # takes compute beside the trials
    derives: bool = False  # whether points are derived from whole trainings
    retried: list[int] = field(default_factory=list)  # numbers of failed trials to try again, ascending
    running: dict[int, Job] = field(default_factory=dict, init=False)  # by the number of the trial
    _proposals: dict[int, Proposal] = field(default_factory=dict, init=False)  # of trials that are not over
    # Numbers of trials whose configuration another trial is training; they become its duplicates. There is at
    # most one more of them than jobs are running: a small space would propose the same again and again.
    _held: list[int] = field(default_factory=list, init=False)
    _at_once: int = field(default=1, init=False)

    @section("ask")
    def next(self, records: TrialRecords, free: int, at_once: int = 1) -> list[Job]:
        """Return what to do now; nothing where the search is done, or has to wait for what is running.

        The records are of all trials by number, finished and paused; there are at most `free` jobs, and so
        many trainings run `at_once`.
        """
        self._at_once = at_once
        jobs: list[Job] = []
        while len(jobs) < free and (job := self._next(records)) is not None:
            self.running[job.number] = job
            jobs.append(job)
        return jobs

    def finished(self, record: TrialRecord) -> Proposal | None:
        """Note that a job is over; return what was proposed for a new trial, None for one that was known."""
        self.running.pop(record.number, None)
        return self._proposals.pop(record.number, None)

    @property
    def proposed(self) -> Collection[Proposal]:
        """What was proposed for new trials that are not over."""
        return self._proposals.values()

    def spent(self, records: TrialRecords) -> Spent:
        """Return what was spent, on the trials and beside them."""
        beside = Cost() if self.overhead is None else self.overhead.cost
        return records.spent + Spent(cost=beside)

    def lacking(self, records: TrialRecords) -> list[TrialRecord]:
        """Return the trials on the front, or with a derived point there, that lack trainings."""
        if self.seeds == 1:
            return []
        trained = (
            records.numbered(number) for number in sorted({point.trained for point in records.front()})
        )
        return under_replicated((record for record in trained if record is not None), self.seeds)

    def _rivals(self, records: TrialRecords) -> Rivals | None:
        if not self.derives:
            return None
        names = [objective.name for objective in self.objectives]
        front = (point.evaluation.values for point in records.front())
        return tuple({name: values[name] for name in names} for values in front)

    def promising(self, records: TrialRecords) -> list[tuple[TrialRecord, int]]:
        """Return the paused trials that are expected to come onto the front, and the rungs they go to."""
        return [] if self.promoter is None else self.promoter.promising(records, self.running)

    def _next(self, records: TrialRecords) -> Job | None:
        spent = self.spent(records)
        spent = replace(spent, trials=spent.trials + len(self._proposals))
        if self.budget.spent_share(replace(spent, trials=0)) >= 1:
            return None
        if (job := self._again(records)) is not None:
            return job
        begins = self.budget.spent_share(spent) < 1 and not is_exhausted(records, self.budget)
        lacking = self.lacking(records)
        reserved = cost_of_replicates(lacking, self.seeds)
        if self.overhead is not None:
            evaluations = [record.evaluation for record in lacking]
            reserved += self.overhead.cost_to_come(evaluations, self.seeds)
        may_wait = begins and self.budget.spent_share(spent, reserved, self._at_once) < 1
        waiting = [record for record in lacking if record.number not in self.running]
        latest = max([-1, *self.running, *(record.number for record in records[-1:])])
        if (record := next_to_replicate(waiting, latest, may_wait=may_wait)) is not None:
            return Replicate(record=record, training=record.evaluation.trainings)
        if (promoted := self._promoted(records, spent, reserved, begins=begins)) is not None:
            return Resume(record=promoted[0], rung=promoted[1], rivals=self._rivals(records))
        return self._new(records, spent) if begins else None

    def _promoted(
        self, records: TrialRecords, spent: Spent, reserved: Cost, *, begins: bool
    ) -> tuple[TrialRecord, int] | None:
        """Return the trial to train on; promising ones once the budget is just enough for them."""
        if self.promoter is None:
            return None
        promoted = self.promoter.next(records, self.running)
        if promoted is not None or (begins and not self.budget.bounds_compute):
            return promoted
        promising = self.promising(records)
        for record, _ in promising:
            evaluation = record.evaluation
            reserved += evaluation.cost.times(1 / evaluation.fidelity - 1)
        may_wait = begins and self.budget.spent_share(spent, reserved, self._at_once) < 1
        return None if may_wait or not promising else promising[0]

    def _again(self, records: TrialRecords) -> Job | None:
        """Return a trial that is to be tried again, or one whose original was being trained."""
        while self.retried:
            record = records.numbered(self.retried.pop(0))
            assert record is not None, "only trials on record have failed"
            original = None if record.duplicate_of is None else records.numbered(record.duplicate_of)
            if original is not None:
                return Duplicate(number=record.number, original=original, baseline=record.baseline)
            return New(
                number=record.number,
                configuration=record.evaluation.configuration,
                baseline=record.baseline,
                rung=self._first_rung,
                failed=record,
                rivals=self._rivals(records),
            )
        for number in self._held:
            if (job := self._of(number, self._proposals[number], records)) is not None:
                self._held.remove(number)
                return job
        return None

    @property
    def _first_rung(self) -> int | None:
        return None if self.promoter is None else 0

    def _new(self, records: TrialRecords, spent: Spent) -> Job | None:
        """Begin a trial; None where too many try what others are training.

        Such a trial is held back until the other is over, and one with the next number begins meanwhile.
        """
        while len(self._held) <= len(self.running) and self.budget.spent_share(spent) < 1:
            number = self._next_number(records)
            pending = [proposal.configuration for proposal in self._proposals.values()]
            proposal = self.propose(number, records, pending)
            self._proposals[number] = proposal
            if (job := self._of(number, proposal, records)) is not None:
                return job
            self._held.append(number)
            spent = replace(spent, trials=spent.trials + 1)
        return None

    def _next_number(self, records: TrialRecords) -> int:
        """Return the lowest number without a trial: one that a killed process ran is run again."""
        begun = self._proposals.keys()
        highest = max([-1, *begun, *(record.number for record in records[-1:])])
        if len(records) + len(begun) == highest + 1:  # no gaps
            return highest + 1
        used = {record.number for record in records} | self.running.keys() | begun
        return next(number for number in count() if number not in used)

    def _of(self, number: int, proposal: Proposal, records: TrialRecords) -> Job | None:
        """Return the job of a proposal; None where another trial is training the same.

        What was tried before is not trained again, unless it failed.
        """
        key, baseline = proposal.configuration.key, proposal.baseline
        if any(isinstance(job, New) and job.configuration.key == key for job in self.running.values()):
            return None
        original = records.tried(key)
        if original is not None and original.evaluation.status in ("complete", "paused"):
            return Duplicate(number=number, original=original, baseline=baseline)
        configuration, rung = proposal.configuration, self._first_rung
        rivals = self._rivals(records)
        return New(number=number, configuration=configuration, baseline=baseline, rung=rung, rivals=rivals)
