"""Run one job: attach, count, check the constraints, train, measure, detach, and keep the trained tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, Evaluation, TrialRecord, with_replicate
from autopeft.core.jobs import Duplicate, Job, New, Replicate, Resume, Rivals
from autopeft.core.seeding import training_seed
from autopeft.evaluation.derived import allocated, derive, derive_again
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import InitialWeights, Trained
from autopeft.evaluation.warm_start import WarmStartError, WarmStarts, initial_weights
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.training_checkpoint import TrainingCheckpoint, TrainingCheckpoints

_NOTHING = Cost()


@dataclass(frozen=True, eq=False)
class TrialRunner:
    """Runs jobs on one resident backbone.

    What a training leaves is on disk before its record is returned: a trial that is recorded is never
    without its tensors.
    """

    evaluator: Evaluator
    checkpoints: AdapterCheckpoints
    paused: TrainingCheckpoints
    seed: int  # the search's
    warm_starts: WarmStarts | None = None

    def run(self, job: Job) -> TrialRecord:
        """Return the record of a job; whatever goes wrong in training is one too.

        Raises:
            KeyboardInterrupt: The user interrupted; nothing is left of the job.
        """
        match job:
            case New():
                paused = self.left_behind(job)
                if paused is not None:
                    job = replace(job, failed=None)  # whose cost the checkpoint has
                trained = self.evaluator.train(
                    job.configuration,
                    self.seed_of(job) if paused is None else paused.evaluation.seed,
                    rung=job.rung,
                    paused=paused,
                    initial_weights=self.initial_weights(job) if paused is None else None,
                )
                return self.recorded(job, trained)
            case Resume(record=record, rung=rung):
                paused = self._paused(record.number, record.evaluation.configuration)
                seed = record.evaluation.seed
                trained = self._trained(record.evaluation, seed, rung=rung, paused=paused)
                return self._kept(record, trained, job.rivals)
            case Replicate():
                return self._replicated(job)
            case Duplicate(number=number, original=original, baseline=baseline):
                return replace(original, number=number, duplicate_of=original.number, baseline=baseline)

    def seed_of(self, job: New) -> int:
        """Return the seed of a new trial's first training."""
        return training_seed(self.seed, job.number)

    def initial_weights(self, job: New) -> InitialWeights | None:
        """Return a new trial's initial weights; None for random ones, which baselines always have."""
        if self.warm_starts is None or job.baseline is not None:
            return None
        return self.warm_starts.for_new_trial(job.configuration)

    def untrained(self, job: New | Resume | Replicate) -> int | None:
        """Return which training of the largest LoRA a job has to begin with; None for none."""
        if self.warm_starts is None:
            return None
        if isinstance(job, New):
            inherits = job.baseline is None and self.warm_starts.inherits(job.configuration)
        else:
            inherits = job.record.evaluation.warm_start
        number = job.training if isinstance(job, Replicate) else 0
        return number if inherits and not self.warm_starts.has(number) else None

    def left_behind(self, job: New) -> TrainingCheckpoint | None:
        """Return what a process left of a job that was killed before it could record it."""
        return None if job.rung is None else self._paused(job.number, job.configuration)

    def _paused(self, number: int, configuration: Configuration) -> TrainingCheckpoint | None:
        """Return what a trial's training goes on from; None where it is missing or of another configuration.

        A worker that has outlived its search may have written that, see `AdapterCheckpoints`.
        """
        paused = self.paused.load(number)
        return None if paused is None or paused.evaluation.configuration != configuration else paused

    def recorded(self, job: New, trained: Trained) -> TrialRecord:
        """Keep what a new trial's training left, and return its record."""
        if job.failed is not None:
            trained = trained.with_added_cost(replace(job.failed.evaluation.cost, steps=0))
        record = TrialRecord(number=job.number, evaluation=trained.evaluation, baseline=job.baseline)
        return self._kept(record, trained, job.rivals)

    def _kept(self, record: TrialRecord, trained: Trained, rivals: Rivals | None) -> TrialRecord:
        if trained.paused is not None:
            self.paused.save(record.number, trained.paused)
        outcomes = [trained]
        if trained.state is not None and record.evaluation.configuration.allocation is not None:
            outcomes = allocated(self.evaluator, trained)
        elif trained.state is not None and rivals is not None:
            outcomes = derive(self.evaluator, trained, rivals)
        record = replace(record, evaluation=outcomes[0].evaluation)
        for point, outcome in zip(record.points, outcomes, strict=True):
            if outcome.state is not None:
                self.checkpoints.save(point, outcome.state, outcome.evaluation.seed)
        return record

    def failed(self, job: New | Resume | Replicate, reason: str) -> TrialRecord:
        """Return the record of a job whose process is gone."""
        if isinstance(job, New):
            return self.recorded(job, Trained(_failed(job.configuration, self.seed_of(job), reason)))
        evaluation = job.record.evaluation
        seed = self._seed_of_replicate(job) if isinstance(job, Replicate) else evaluation.seed
        failed = _failed(evaluation.configuration, seed, reason)
        if isinstance(job, Replicate):
            return replace(job.record, evaluation=with_replicate(evaluation, failed, self._worst))
        return replace(job.record, evaluation=replace(failed, cost=evaluation.cost))

    def _seed_of_replicate(self, job: Replicate) -> int:
        return training_seed(self.seed, job.number, job.training)

    def _replicated(self, job: Replicate) -> TrialRecord:
        """Train a trial again, and cut it to the points that were derived from it.

        Of the trainings of the trial, and of each point, the tensors of the best are kept.
        """
        record, evaluation = job.record, job.record.evaluation
        seed = self._seed_of_replicate(job)
        trained = self._trained(evaluation, seed, training=job.training)
        if trained.state is not None:
            cuts = (point.configuration for point in evaluation.derived)
            trained, *derived = derive_again(self.evaluator, trained, cuts)
            for point, outcome in zip(record.points, [trained, *derived], strict=True):
                self._keep_better(point, outcome)
        return replace(record, evaluation=with_replicate(evaluation, trained.evaluation, self._worst))

    def _keep_better(self, record: TrialRecord, trained: Trained) -> None:
        """Keep the tensors of a further training if they are better than those that are kept."""
        monitor, evaluation = self.evaluator.monitor, trained.evaluation
        if trained.state is None:
            return
        # A trial that was off the front for a while may have none.
        kept_seed = self.checkpoints.seed(record)
        kept = None if kept_seed is None else record.evaluation.each_training().get(kept_seed)
        if kept is None or monitor.is_better(evaluation.values[monitor.name], kept[monitor.name]):
            self.checkpoints.save(record, trained.state, evaluation.seed)

    def _trained(
        self,
        evaluation: Evaluation,
        seed: int,
        *,
        rung: int | None = None,
        paused: TrainingCheckpoint | None = None,
        training: int = 0,
    ) -> Trained:
        """Train a known trial on, or again from its initial weights; that these are gone is a failure."""
        configuration = evaluation.configuration
        try:
            # A checkpoint holds the weights; where its file is gone, the training starts anew.
            weights = None if paused is not None else initial_weights(self.warm_starts, evaluation, training)
        except WarmStartError as error:
            cost = evaluation.cost if training == 0 else _NOTHING  # a further training's is added to it
            return Trained(_failed(configuration, seed, str(error), cost))
        return self.evaluator.train(configuration, seed, rung=rung, paused=paused, initial_weights=weights)

    @cached_property
    def _worst(self) -> dict[str, float]:
        """The metrics of a replicate that fails."""
        task, data = self.evaluator.task, self.evaluator.data
        return {metric.name: task.trivial_score(metric.name, data) for metric in task.metrics}


def _failed(configuration: Configuration, seed: int, reason: str, cost: Cost = _NOTHING) -> Evaluation:
    return Evaluation(
        configuration=configuration, status="failed", reason=reason, cost=cost, seed=seed, fidelity=0.0
    )
