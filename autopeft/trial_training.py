"""One trial's trainings: from the start, on from a pause, and again with another seed."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from autopeft.checkpoints import Checkpoints
from autopeft.configuration import Configuration
from autopeft.evaluation import TrialRecord
from autopeft.evaluation_run import Trained
from autopeft.evaluator import Evaluator
from autopeft.front import ParetoFront
from autopeft.paused_training import PausedTrainings
from autopeft.repeats import lacking, with_repeat
from autopeft.seeding import training_seed


class TrialTraining:
    """Trains trials, and keeps on disk what a training leaves before its trial is recorded.

    Args:
        evaluator: Trains a configuration.
        checkpoints: Trained tensors of those on the front, and of those that may come onto it.
        paused: What paused trainings go on from.
        seed: The search's.
        seeds: Trainings that a member of the front is to have.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        paused: PausedTrainings,
        *,
        seed: int,
        seeds: int,
    ) -> None:
        self._evaluator = evaluator
        self._checkpoints = checkpoints
        self._paused = paused
        self._seed = seed
        self._seeds = seeds

    def begin(
        self,
        number: int,
        configuration: Configuration,
        front: ParetoFront,
        *,
        anchor: str | None,
        rung: int | None,
    ) -> TrialRecord:
        """Train a new trial up to a rung; to the end where it is None."""
        # What was paused by a process that was killed before it could record the trial goes on.
        paused = None if rung is None else self._paused.load(number)
        seed = training_seed(self._seed, number) if paused is None else paused.evaluation.seed
        trained = self._evaluator.train(configuration, seed, rung=rung, paused=paused)
        record = TrialRecord(number=number, evaluation=trained.evaluation, anchor=anchor)
        return self._kept(record, trained, front)

    def go_on(self, record: TrialRecord, front: ParetoFront, rung: int) -> TrialRecord:
        """Train a paused trial on to a rung."""
        trained = self._evaluator.train(
            record.evaluation.configuration,
            record.evaluation.seed,
            rung=rung,
            paused=self._paused.load(record.number),
        )
        return self._kept(replace(record, evaluation=trained.evaluation), trained, front)

    def repeat(self, record: TrialRecord) -> TrialRecord:
        """Train a completed trial again with another seed; of its trainings the better's tensors are kept."""
        evaluation, monitor = record.evaluation, self._evaluator.monitor
        seed = training_seed(self._seed, record.number, evaluation.trainings)
        trained = self._evaluator.train(evaluation.configuration, seed)
        if trained.state is not None:
            # Where the trial was off the front for a while, there may be none.
            kept_seed = self._checkpoints.seed(record.number)
            kept = None if kept_seed is None else evaluation.each_training().get(kept_seed)
            if kept is None or trained.evaluation.values[monitor] > kept[monitor]:
                self._checkpoints.save(record.number, trained.state, seed)
        return replace(record, evaluation=with_repeat(evaluation, trained.evaluation, self._worst))

    @cached_property
    def _worst(self) -> dict[str, float]:
        """The worst of each of the task's metrics, which a repeat that fails has."""
        task = self._evaluator.task
        return {name: task.majority_score(name) for name in task.metrics}

    def _kept(self, record: TrialRecord, trained: Trained, front: ParetoFront) -> TrialRecord:
        """Keep what a training left, before its trial is recorded: it must never be without its tensors.

        Who beats it may fall when trained again.
        """
        if trained.paused is not None:
            self._paused.save(record.number, trained.paused)
        if trained.state is not None:
            is_member = record.number in front.with_trial(record).members
            if is_member or lacking((point.record for point in front), self._seeds):
                self._checkpoints.save(record.number, trained.state, record.evaluation.seed)
        return record
