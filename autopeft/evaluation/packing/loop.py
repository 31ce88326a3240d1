"""Train the candidates of a pack together: one forward and backward pass a step, everything else their own.

A plain loop instead of Lightning's Trainer: its callbacks and its early stopping look after one module with
one loss, and a Trainer cannot end one of several candidates.
What a candidate is given is what the Trainer gives it alone: `FineTuning` makes optimizer and schedule, the
order of batches, clipping, validations and stopping are the same, so that results are equal within float
tolerance where there is no dropout. With dropout, masks are drawn for the rows of all candidates (below the
cut for one batch that all share) and differ from those of a training alone. A candidate that pauses at a rung
leaves the state that `autopeft.training.trainer_state` takes out of a Trainer, and goes on alone from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from autopeft.callbacks import StopOnDivergence
from autopeft.core.evaluation import Cost
from autopeft.core.profiling import section
from autopeft.core.seeding import generator_states
from autopeft.evaluation.packing.adapters import Member
from autopeft.evaluation.packing.forward import PackedModel, cut_of
from autopeft.models.backbone import Backbone
from autopeft.tasks import Batch, Task, TaskData
from autopeft.tasks.batch import LABELS
from autopeft.training.compute_meter import ComputeMeter
from autopeft.training.module import FineTuning
from autopeft.training.settings import Training
from autopeft.training.training_checkpoint import TrainingState
from autopeft.training.validation_schedule import SegmentedBatches, ValidationSchedule

_LOSS_LIMIT = StopOnDivergence().loss_limit


class PackedCandidate:
    """One candidate on its way through a packed training.

    Args:
        member: Configuration and initial parameters; the parameters are trained in place.
        module: Gives loss, metrics, optimizer and schedule, over the parameters.
        training: Clipping and early stopping.
        monitor: Metric whose best validation is kept.
        names: The parameters' names in a `FineTuning` of the backbone, by the member's own.

    Attributes:
        points: Learning curve: (metric, optimizer step, value).
        steps: Optimizer steps taken.
        examples: Rows trained on.
        metrics: Metrics of the best validation.
        cost: The candidate's share of the compute.
        training_seconds: Its share of the time in which the pack was trained, without validations.
        reason: Why it failed; None while it has not.
        paused: What it goes on from; None where it is done.
    """

    def __init__(
        self,
        member: Member,
        module: FineTuning,
        training: Training,
        monitor: str,
        names: Mapping[str, str],
    ) -> None:
        self.member = member
        self.module = module
        self.training = training
        self.monitor = monitor
        self._names = names
        made = module.configure_optimizers()
        self._optimizer = made["optimizer"]
        self._scheduler = made["lr_scheduler"]["scheduler"]
        self.points: list[tuple[str, int, float]] = []
        self.steps = 0
        self.examples = 0
        self.metrics: dict[str, float] = {}
        self.cost = Cost()
        self.training_seconds = 0.0
        self.reason: str | None = None
        self.paused: TrainingState | None = None
        self.finished = False
        self._losses: list[float] = []
        self._best = math.nan
        self._without_improvement = 0
        self._weights: dict[str, Tensor] = {}

    @property
    def examples_per_second(self) -> float:
        """Examples trained on a second of the candidate's share; 0 before training."""
        return self.examples / self.training_seconds if self.training_seconds else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the parameters."""
        return {name: one.detach().cpu().clone() for name, one in self.member.parameters.items()}

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self.member.parameters.values())

    def step(self, rows: int) -> None:
        """Clip the gradients, and take a step of optimizer and schedule."""
        if self.training.gradient_clip is not None:
            clip_grad_norm_(self._parameters, self.training.gradient_clip)
        self._optimizer.step()
        self._scheduler.step()
        self.steps += 1
        self.examples += rows

    def note_loss(self, loss: float) -> None:
        """Note the loss of the latest step; one that is beyond use ends the candidate."""
        self._losses.append(loss)
        if not math.isfinite(loss) or loss > _LOSS_LIMIT:
            self.fail(f"the training loss was {loss:g} at step {self.steps}")

    def fail(self, why: str) -> None:
        """End the candidate as diverged."""
        self.reason = f"diverged: {why}"
        self.finished = True

    def validated(self) -> None:
        """Note the metrics that were collected, keep the best weights, and see whether to stop."""
        values = {name: float(one) for name, one in self.module.take_validated().items()}
        if self._losses:
            self.points.append(("training_loss", self.steps, sum(self._losses) / len(self._losses)))
            self._losses = []
        self.points += [(name, self.steps, value) for name, value in sorted(values.items())]
        value = values[self.monitor]
        if math.isnan(self._best) or value > self._best:
            self._best, self.metrics, self._without_improvement = value, values, 0
            self._weights = {name: one.detach().clone() for name, one in self.member.parameters.items()}
        else:
            self._without_improvement += 1
        patience = self.training.patience
        if patience is not None and (not math.isfinite(value) or self._without_improvement >= patience):
            self.finished = True

    def pause(self, device: torch.device) -> None:
        """Note everything that a training alone goes on from."""
        stopping = {"wait_count": self._without_improvement, "stopped_epoch": 0, "best_score": self._best}
        named = [(self._names[name], one) for name, one in self.member.parameters.items()]
        self.paused = TrainingState(
            step=self.steps,
            weights={name: one.detach().cpu().clone() for name, one in named},
            best_weights={self._names[name]: one.cpu() for name, one in self._weights.items()},
            best=self._best,
            best_metrics=dict(self.metrics),
            optimizer={
                f"{name}|{entry}": value.detach().cpu().clone()
                for name, one in named
                for entry, value in self._optimizer.state[one].items()
            },
            generators=generator_states(device),
            early_stopping={}
            if self.training.patience is None
            else {**stopping, "patience": self.training.patience},
        )

    def finish(self) -> None:
        """Look at the trained weights, which a last step can break, then put the best ones back."""
        broken = next((n for n, one in self.member.parameters.items() if not one.isfinite().all()), None)
        if self.reason is None and broken is not None:
            self.fail(f"{broken} is not finite after training")
            self.paused = None
        with torch.no_grad():
            for name, weights in self._weights.items():
                self.member.parameters[name].copy_(weights)
        self._weights = {}


def shares(cuts: Sequence[int], blocks: int) -> list[float]:
    """Return the share of each candidate in the work of a pack; they add up to 1.

    A candidate pays forward and backward of the blocks from its cut on, and an equal part of the forward of
    each block it shares with others.

    Args:
        cuts: Number of blocks below each candidate's lowest adapter.
        blocks: Number of blocks of the backbone.
    """
    work = [
        2 * (blocks - cut) + sum(1 / sum(other > block for other in cuts) for block in range(cut))
        for cut in cuts
    ]
    return [one / sum(work) for one in work]


class PackedTraining:
    """A training of several candidates on one resident backbone.

    Args:
        backbone: Carries nothing before and after.
        task: Gives the loss.
        data: Gives the batches.
        training: What the candidates have in common.
        candidates: Who is trained.
        plan: At which steps they are validated.
        end: Step of the plan after which they pause; its last step to train them to the end.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        data: TaskData,
        training: Training,
        candidates: Sequence[PackedCandidate],
        *,
        plan: ValidationSchedule,
        end: int,
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.data = data
        self.training = training
        self.plan = plan
        self.end = end
        self._candidates = list(candidates)
        self._device = training.resolved_device()
        self._meter = ComputeMeter(self._device)

    def run(self, seed: int) -> None:
        """Train up to the plan's `end`, or until the last candidate has ended.

        Args:
            seed: Seed of shuffling and dropout, the same for every candidate.
        """
        loader = self.data.train_dataloader(seed)
        batches = SegmentedBatches(loader, self.plan, self.data.steps_per_epoch)
        self._model = self._pack()
        try:
            self._model.train(True)
            for _ in range(self.plan.pieces(0, self.end)):
                self._train_to_stop(batches)
                if not self._candidates:
                    break
        finally:
            self._model.remove()
            self.backbone.model.eval()
        if self.end < self.plan.total_steps:
            for candidate in self._candidates:
                candidate.pause(self._device)
        self._charge(training=False)
        self._leave(self._candidates)

    def _train_to_stop(self, batches: SegmentedBatches) -> None:
        """Train up to the plan's next stop, and validate there those who have not ended."""
        rows = iter(batches)
        while (batch := self._next(rows)) is not None:
            self._step(batch)
            if not self._candidates:
                return
        self._charge(training=True)
        self._validate()

    def _pack(self) -> PackedModel:
        return PackedModel(
            self.backbone,
            [one.member for one in self._candidates],
            without_dropout=self.training.frozen_blocks != "train",
        )

    def _mixed(self) -> AbstractContextManager[None]:
        """Compute in the training's precision; a pack is built outside, from the weights as they are."""
        return self.backbone.computing_in(self.training.resolved_precision())

    def _batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: one.to(self._device) for name, one in batch.items()}

    @section("data")
    def _next(self, batches: Iterator[Batch]) -> dict[str, Tensor] | None:
        batch = next(batches, None)
        return None if batch is None else self._batch(batch)

    def _step(self, batch: Mapping[str, Tensor]) -> None:
        """Take one step with every candidate; those that diverge leave."""
        labels = batch[LABELS]
        with section("forward"), self._mixed():
            losses = torch.stack([self.task.loss(logits, labels) for logits in self._model(batch)])
        with section("backward"):
            self._model.zero_grad()
            losses.sum().backward()  # the sum's gradient of each loss is 1, and no slice depends on another
        with section("optimizer"):
            for candidate in self._candidates:
                candidate.step(len(labels))
        for candidate, loss in zip(self._candidates, losses.tolist(), strict=True):
            candidate.note_loss(loss)
        if any(one.finished for one in self._candidates):
            self._charge(training=True)
            self._repack()

    @torch.inference_mode()
    def _predict(self) -> None:
        for batch in self.data.val_dataloader():
            on_device = self._batch(batch)
            with self._mixed():
                logits = self._model(on_device)
            for candidate, own in zip(self._candidates, logits, strict=True):
                candidate.module.add_validated(own, on_device[LABELS])

    @section("evaluate")
    def _validate(self) -> None:
        """Validate every candidate; those that have stopped improving leave."""
        self._model.train(False)
        self._predict()
        for candidate in self._candidates:
            candidate.validated()
        self._model.train(True)
        self._charge(training=False)
        if any(one.finished for one in self._candidates):
            self._repack()

    def _repack(self) -> None:
        self._model.remove()
        self._leave([one for one in self._candidates if one.finished])
        self._candidates = [one for one in self._candidates if not one.finished]
        if self._candidates:
            self._model = self._pack()
            self._model.train(True)

    def _leave(self, candidates: Sequence[PackedCandidate]) -> None:
        for candidate in candidates:
            candidate.finish()

    def _charge(self, *, training: bool) -> None:
        """Share the compute since the last time among those who are there."""
        spent = self._meter.read()
        if not self._candidates:
            return
        cuts = [cut_of(self.backbone, one.member.configuration) for one in self._candidates]
        for candidate, share in zip(self._candidates, shares(cuts, len(self.backbone.blocks)), strict=True):
            own = spent.times(share)
            candidate.cost += own
            if training:
                candidate.training_seconds += own.wall_seconds
