"""The loop of a search: schedule, execute, record, and tell those that listen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from autopeft.core.evaluation import TrialRecord
from autopeft.core.interrupts import interruptible
from autopeft.core.jobs import Job
from autopeft.core.objectives import Objective
from autopeft.core.pareto import dominated, front_records
from autopeft.core.profiling import section
from autopeft.evaluation.executor import Executor
from autopeft.optimization.budget import raise_if_hopeless
from autopeft.optimization.scheduler import Scheduler
from autopeft.optimization.seed_replication import under_replicated
from autopeft.optimization.study_store import StudyStore
from autopeft.reporting.front import ParetoFront
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.training_checkpoint import TrainingCheckpoints

TrialListener = Callable[[TrialRecord, ParetoFront], None]
"""Called with a trial that has finished, paused or been trained again, and the front with it."""


def run_loop(
    scheduler: Scheduler,
    executor: Executor,
    study: StudyStore,
    front: ParetoFront,
    *,
    started: Callable[[Job], None],
    listeners: Sequence[TrialListener],
) -> ParetoFront:
    """Run jobs until the scheduler has none left; trials may finish out of order.

    Args:
        scheduler: Decides what is done next.
        executor: Runs jobs; a failure is a record.
        study: Keeps the records: one that was told survives anything.
        front: The front of the study's records.
        started: Called with every job that was submitted.
        listeners: Called with every record, after it was kept. What they raise ends the loop.

    Returns:
        The front of all trials.
    """
    while True:
        with interruptible():
            for job in scheduler.next(study.records, executor.free, executor.at_once):
                executor.submit(job)
                started(job)
            if not scheduler.running:
                return front
            if (finished := executor.wait()) is None:
                continue
            for record in study.tell(finished, scheduler.finished(finished)):
                with section("record"):
                    front = front.with_trial(record)
                for listener in listeners:
                    listener(record, front)
            raise_if_hopeless(study.records)


@dataclass(eq=False)
class FileCleanup:
    """Listens to records, and deletes files that are not needed any more.

    Trained tensors are kept of what is on the front or may yet come onto it, and of trials with several
    trainings. A member without all replicates may drop out and let dominated trials return.
    """

    checkpoints: AdapterCheckpoints
    paused: TrainingCheckpoints
    seeds: int  # trainings that a member of the front is to have
    running: Collection[int]  # numbers of the trials that are being trained, whose files may be new
    # Trials and points that may have tensors, by number; None before the first call: a look for each of all
    # costs too much.
    _kept: dict[int, TrialRecord] | None = field(default=None, init=False)

    def __call__(self, record: TrialRecord, front: ParetoFront) -> None:
        """Delete what a trial that is over, and the trials that it drove off the front, have left."""
        if record.evaluation.status != "paused":
            self.paused.drop(record.number)
        if self._kept is None:
            self._kept = {known.number: known for known in front.records}
        self._kept |= {point.number: point for point in record.points}
        needed = self._needed(list(self._kept.values()), front.objectives)
        self.checkpoints.drop(self._kept.keys() - needed)
        self._kept = {number: self._kept[number] for number in needed}

    def tidy(self, front: ParetoFront) -> None:
        """Before anything is trained: delete also what a killed process, or a worker of one, has left.

        The state of a trial without a record is kept: it goes on from there.
        """
        self.checkpoints.keep_only(self._needed(front.records, front.objectives))
        over = {record.number for record in front.records if record.evaluation.status != "paused"}
        self.paused.keep_only(self.paused.numbers - over)

    def _needed(self, records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> set[int]:
        """Return the trials and points whose tensors are needed."""
        complete = [
            record
            for record in records
            if record.evaluation.status == "complete" and record.duplicate_of is None
        ]
        lacking = {record.number for record in under_replicated(complete, self.seeds)}
        lasting = front_records([record for record in complete if record.number not in lacking], objectives)
        values, bounds = ([record.evaluation.values for record in several] for several in (complete, lasting))
        flags = dominated(values, bounds, objectives)
        hopeful = {record.number for record, is_out in zip(complete, flags, strict=True) if not is_out}
        # What is trained again changes with all that was cut from it.
        changed = hopeful & lacking
        changing = {record.trained for record in complete if record.number in changed}.union(self.running)
        return {
            record.number
            for record in records
            if record.number in hopeful or record.trained in changing or record.evaluation.by_seed
        }
