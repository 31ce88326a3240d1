"""Evaluate one configuration: what it costs before training, then train it, measure, and take it out."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation
from autopeft.evaluation.context import EvaluationContext
from autopeft.evaluation.run import EvaluationRun, InitialWeights, Trained, reason_of_failure
from autopeft.methods import Attachment, attach
from autopeft.tasks.base import SplitName
from autopeft.training.training_checkpoint import TrainingCheckpoint


class Evaluator(EvaluationContext):
    """Attach, train and measure configurations on one resident backbone.

    For its arguments see `EvaluationContext`.
    """

    def costs(self, configuration: Configuration) -> dict[str, float]:
        """Return every cost that is exact before training."""
        with (
            self.own_dropout(),
            attach(self.backbone, configuration, self.seed) as attachment,
            self.hidden_states.below(attachment),
        ):
            return self.attached_costs(attachment)

    def evaluate(self, configuration: Configuration, seed: int | None = None) -> Evaluation:
        """Evaluate a configuration; see `train`."""
        return self.train(configuration, seed).evaluation

    def train(
        self,
        configuration: Configuration,
        seed: int | None = None,
        *,
        attachment: type[Attachment] = Attachment,
        rung: int | None = None,
        paused: TrainingCheckpoint | None = None,
        initial_weights: InitialWeights | None = None,
        is_trial: bool = True,
    ) -> Trained:
        """Check a configuration's costs, train it, and measure the objectives on the validation split.

        Whatever goes wrong in training is an outcome: memory that does not suffice, a loss that is not
        finite, any exception. Only an interrupt by the user is raised.

        Args:
            configuration: What to evaluate.
            seed: Another seed than the evaluator's.
            attachment: How it is attached; `FullFineTuning` trains every weight instead.
            rung: Pause there (an index into the plan's rungs); None to train to the end.
            paused: Go on from there: the outcome is that of a training that never paused.
            initial_weights: What to begin from; None for random weights by the seed. What goes on from a
                pause has no use for them.
            is_trial: Whether the constraints bind it, and all objectives are measured; if not, it is trained
                for its tensors alone.

        Raises:
            ValueError: The backbone cannot carry the configuration.
            KeyboardInterrupt: The user interrupted; the backbone is detached.
        """
        self.backbone.check(configuration)
        end = self.plan.total_steps if rung is None else self.plan.rungs[rung]
        if paused is not None and paused.step >= end:
            return Trained(paused.evaluation, paused=paused)
        seed = self.seed if seed is None else seed
        run = EvaluationRun(self, configuration, seed, end, attachment, paused, initial_weights, is_trial)
        reason = reason_of_failure(run.attempt)
        # Outside the except block on purpose: the traceback would keep the tensors alive.
        if reason is not None and self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return run.outcome(reason)

    def test(
        self,
        configuration: Configuration,
        state: Mapping[str, Tensor],
        *,
        attachment: type[Attachment] = Attachment,
    ) -> dict[str, float]:
        """Return the metrics on the held-out test split, which the search never reads.

        Args:
            configuration: What was trained.
            state: Its trained tensors.
            attachment: How it was attached; see `train`.
        """
        return self.score(configuration, state, "test", attachment=attachment)

    def score(
        self,
        configuration: Configuration,
        state: Mapping[str, Tensor],
        split: SplitName,
        *,
        attachment: type[Attachment] = Attachment,
    ) -> dict[str, float]:
        """Return the metrics of trained tensors on a split; for the arguments see `test`."""
        with attachment(self.backbone, configuration, self.seed) as attached:
            attached.load_state_dict(state)
            return self.batch_metrics(configuration, split) | self.measured_at_end(split)

    def measure(
        self, configuration: Configuration, state: Mapping[str, Tensor], frozen: int | None
    ) -> dict[str, float]:
        """Return all of trained tensors that needs no training: sizes, speeds, metrics in validation.

        For the arguments see `test`; `frozen` is the number of blocks below what was trained just now.
        """
        with (
            attach(self.backbone, configuration, self.seed) as attachment,
            self.hidden_states.below(attachment, frozen),
        ):
            attachment.load_state_dict(state)
            if any(use.cut == frozen for use in self.hidden_states.uses):
                self.hidden_states.open()  # that they are computed would not pay for one validation
            values = self.sizes(attachment) | self.speeds(self.needed)
            values |= self.batch_metrics(configuration, "validation") | self.measured_at_end("validation")
        if "tokens_per_second_merged" in self.needed:
            values["tokens_per_second_merged"] = self.merged_generation_speed(configuration)
        return values
