"""One trial's trainings: from the start, on from a pause, and again with another seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, Evaluation, TrialRecord
from autopeft.core.seeding import training_seed
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import Trained
from autopeft.evaluation.supernet.warm_start import WarmStartError, WarmStarts, initial_weights
from autopeft.optimization.seed_replication import under_replicated, with_replicate
from autopeft.reporting.front import ParetoFront
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.training_checkpoint import TrainingCheckpoint, TrainingCheckpoints


class TrialRunner:
    """Trains trials, and keeps on disk what a training leaves before its trial is recorded.

    Args:
        evaluator: Trains a configuration.
        checkpoints: Trained tensors of those on the front, and of those that may come onto it.
        paused: What paused trainings go on from.
        seed: The search's.
        seeds: Trainings that a member of the front is to have.
        warm_starts: Supernets that LoRA trials are initialised from; None for random weights.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        checkpoints: AdapterCheckpoints,
        paused: TrainingCheckpoints,
        *,
        seed: int,
        seeds: int,
        warm_starts: WarmStarts | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._checkpoints = checkpoints
        self._paused = paused
        self._seed = seed
        self._seeds = seeds
        self._warm_starts = warm_starts

    def begin(
        self,
        trials: Mapping[int, Configuration],
        front: ParetoFront,
        *,
        rung: int | None,
        references: Collection[int] = (),
    ) -> dict[int, TrialRecord]:
        """Train new trials up to a rung.

        Args:
            trials: Configurations by number.
            front: The front so far.
            rung: None to train to the end.
            references: Numbers of baselines: these are initialised from random weights.

        Returns:
            Their records by number.
        """
        outcomes = self._left_behind(trials, rung) or self._from_the_start(trials, rung, references)
        records = {
            number: TrialRecord(number=number, evaluation=one.evaluation) for number, one in outcomes.items()
        }
        return {number: self._kept(one, outcomes[number], front) for number, one in records.items()}

    def _left_behind(self, trials: Mapping[int, Configuration], rung: int | None) -> dict[int, Trained]:
        """Go on from what a process left that was killed before it could record its trials: all, or none."""
        found: dict[int, Trained] = {}
        for number, configuration in trials.items():
            paused = None if rung is None else self._paused.load(number)
            if paused is None or paused.evaluation.configuration != configuration:
                return {}
            seed = paused.evaluation.seed
            found[number] = self._evaluator.train(configuration, seed, rung=rung, paused=paused)
        return found

    def _from_the_start(
        self, trials: Mapping[int, Configuration], rung: int | None, references: Collection[int]
    ) -> dict[int, Trained]:
        if not trials:
            return {}
        sampled = {number: one for number, one in trials.items() if number not in references}
        weights = {} if self._warm_starts is None else self._warm_starts.for_new_trials(sampled)
        return {
            number: self._evaluator.train(
                configuration,
                training_seed(self._seed, number),
                rung=rung,
                initial_weights=weights.get(number),
            )
            for number, configuration in trials.items()
        }

    def go_on(self, record: TrialRecord, front: ParetoFront, rung: int) -> TrialRecord:
        """Train a paused trial on to a rung."""
        trained = self._trained(record.evaluation, rung, self._paused.load(record.number))
        return self._kept(replace(record, evaluation=trained.evaluation), trained, front)

    def repeat(self, record: TrialRecord) -> TrialRecord:
        """Train a completed trial again with another seed; of its trainings the better's tensors are kept."""
        evaluation, monitor = record.evaluation, self._evaluator.monitor
        seed = training_seed(self._seed, record.number, evaluation.trainings)
        trained = self._trained(evaluation, seed=seed, training=evaluation.trainings)
        if trained.state is not None:
            # Where the trial was off the front for a while, there may be none.
            kept_seed = self._checkpoints.seed(record.number)
            kept = None if kept_seed is None else evaluation.each_training().get(kept_seed)
            if kept is None or trained.evaluation.values[monitor] > kept[monitor]:
                self._checkpoints.save(record.number, trained.state, seed)
        return replace(record, evaluation=with_replicate(evaluation, trained.evaluation, self._worst))

    def _trained(
        self,
        evaluation: Evaluation,
        rung: int | None = None,
        paused: TrainingCheckpoint | None = None,
        *,
        seed: int | None = None,
        training: int = 0,
    ) -> Trained:
        """Train a known trial on, or again from what it begins from; that this is gone is a failure."""
        configuration = evaluation.configuration
        seed = evaluation.seed if seed is None else seed
        try:
            # What was paused has its weights; where its file is gone, it begins anew as it began.
            weights = None if paused is not None else initial_weights(self._warm_starts, evaluation, training)
        except WarmStartError as error:
            spent = evaluation.cost if training == 0 else Cost()  # to which a further training's is added
            failed = Evaluation(
                configuration=configuration,
                status="failed",
                reason=str(error),
                cost=spent,
                seed=seed,
                fidelity=0.0,
            )
            return Trained(failed)
        return self._evaluator.train(configuration, seed, rung=rung, paused=paused, initial_weights=weights)

    @cached_property
    def _worst(self) -> dict[str, float]:
        """The worst of each of the task's metrics, which a repeat that fails has."""
        task = self._evaluator.task
        return {name: task.trivial_score(name) for name in task.metrics}

    def _kept(self, record: TrialRecord, trained: Trained, front: ParetoFront) -> TrialRecord:
        """Keep what a training left, before its trial is recorded: it must never be without its tensors.

        Who beats it may fall when trained again.
        """
        if trained.paused is not None:
            self._paused.save(record.number, trained.paused)
        if trained.state is not None:
            is_member = front.would_hold(record)
            if is_member or under_replicated((point.record for point in front), self._seeds):
                self._checkpoints.save(record.number, trained.state, record.evaluation.seed)
        return record
