"""One evaluation on its way: attach, check the costs, train up to a rung or the end, measure."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from autopeft.callbacks import (
    BestWeights,
    DivergenceError,
    LearningCurve,
    PeakMemory,
    StopOnDivergence,
    Throughput,
)
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, CurvePoint, Evaluation, Status
from autopeft.core.interrupts import interruptible
from autopeft.core.objectives import Objective
from autopeft.core.profiling import section
from autopeft.core.seeding import seeded
from autopeft.evaluation.context import EvaluationContext
from autopeft.evaluation.data_initialisation import initialise_from_data
from autopeft.methods import Attachment
from autopeft.methods.attachment import load_tensors
from autopeft.training.compute_meter import ComputeMeter
from autopeft.training.module import FineTuning
from autopeft.training.rank_allocation import allocation_callbacks
from autopeft.training.trainer import build_trainer, dismantle, quiet_lightning
from autopeft.training.training_checkpoint import (
    CaptureState,
    TrainingCheckpoint,
    TrainingState,
    restore_state,
)
from autopeft.training.trial_callbacks import new_callbacks

_logger = logging.getLogger(__name__)

InitialWeights = Mapping[str, Tensor]
"""Tensors that a training begins from instead of random ones, as `Attachment.load_state_dict` takes them."""


@dataclass(frozen=True)
class Trained:
    """An evaluation with what its training left."""

    evaluation: Evaluation  # the outcome
    state: Mapping[str, Tensor] | None = None  # the trained tensors where it completed
    paused: TrainingCheckpoint | None = None  # what the training goes on from where it paused

    def with_added_cost(self, cost: Cost) -> Trained:
        """Return the same with more compute spent on it."""
        evaluation = replace(self.evaluation, cost=self.evaluation.cost + cost)
        paused = None if self.paused is None else replace(self.paused, evaluation=evaluation)
        return replace(self, evaluation=evaluation, paused=paused)


@dataclass(eq=False)
class EvaluationRun:
    """What is known of one evaluation at any point, also when it fails; see `Evaluator.train`."""

    evaluator: EvaluationContext
    configuration: Configuration
    seed: int
    end: int
    attachment: type[Attachment] = Attachment
    before: TrainingCheckpoint | None = None
    initial_weights: InitialWeights | None = None
    is_trial: bool = True

    def __post_init__(self) -> None:
        self.warm_start = False
        self.values: dict[str, float] = {}
        self.violations: list[str] = []
        self.curve = LearningCurve()
        self.throughput = Throughput()
        self.memory = PeakMemory()
        self.state: Mapping[str, Tensor] | None = None
        self.pause: TrainingState | None = None
        self._meter = ComputeMeter(self.evaluator.device)
        if self.before is not None:
            earlier = self.before.evaluation
            self.warm_start = earlier.warm_start
            self.values |= earlier.values
            self.curve.points = [(point.metric, point.step, point.value) for point in earlier.curves]

    def attempt(self) -> None:
        """Cost, check, train, measure."""
        evaluator = self.evaluator
        with (
            evaluator.own_dropout(),
            self.attachment(evaluator.backbone, self.configuration, self.seed) as attachment,
            evaluator.hidden_states.below(attachment),
        ):
            if self.before is None:
                self._begin(attachment)
            else:
                load_tensors(attachment.kept, self.before.state.kept)
            if not self.violations:
                if attachment.parameters:  # else they would serve a single validation
                    evaluator.hidden_states.open()
                self._train(attachment)
        if not self.violations:
            self.measure_merged()

    def _begin(self, attachment: Attachment) -> None:
        """Note the costs and the constraints that they violate, and put initial weights in place."""
        if self.is_trial:
            self.values |= self.evaluator.attached_costs(attachment)
            self.violations = [
                constraint.describe(self.values)
                for constraint in self.evaluator.constraints
                if constraint.violation(self.values) > 0
            ]
        if self.violations:
            return
        if self.initial_weights is None:
            initialise_from_data(self.evaluator, attachment, self.seed)
        else:
            attachment.load_state_dict(self.initial_weights)
            self.warm_start = True

    @section("set-up")
    def _train(self, attachment: Attachment) -> None:
        evaluator, plan = self.evaluator, self.evaluator.plan
        if not attachment.parameters:
            self._validate()
            return
        best = best_weights(evaluator.monitor)
        module = evaluator.module(self.configuration, self.before)
        others = new_callbacks(evaluator.training.callbacks, module)
        others += allocation_callbacks(self.configuration, plan.total_steps)
        capture = CaptureState(best, others)
        watching = (StopOnDivergence(), self.throughput, self.curve)
        callbacks: list[Callback] = [*watching, *others, best, self.memory]
        if self.end < plan.total_steps:
            callbacks.append(capture)
        module.train()
        start = 0 if self.before is None else self.before.step
        with ExitStack() as ending:
            ending.callback(module.eval)
            with seeded(self.seed, evaluator.backbone.devices):
                with quiet_lightning():
                    pieces = plan.pieces(start, self.end)
                    trainer = build_trainer(
                        evaluator.training,
                        callbacks,
                        monitor=evaluator.monitor,
                        pieces=pieces,
                        first_step=start,
                        total_steps=plan.total_steps,
                    )
                ending.callback(dismantle, trainer)
                if self.before is not None:
                    restore_state(self.before.state, trainer, module, best, others)
                _fit(trainer, module, evaluator, best, self.seed)
                if capture.state is not None:
                    kept = {name: tensor.cpu().clone() for name, tensor in attachment.kept.items()}
                    self.pause = replace(capture.state, kept=kept)
            best.restore(module)
        self.values |= best.metrics
        self._measure()
        if self.pause is None:
            self.state = attachment.state_dict()

    def _validate(self) -> None:
        """Measure a model of which nothing is trained: neither an adapter nor a head."""
        metrics = self.evaluator.batch_metrics(self.configuration, "validation", [self.memory])
        self.curve.points += [(name, 0, value) for name, value in metrics.items()]
        self.values |= metrics
        self._measure()
        self.state = {}

    def _measure(self) -> None:
        """Note time, memory and latency; raise where a validation or an objective is not finite."""
        evaluator = self.evaluator
        speed = self.throughput.examples_per_second
        seconds, earlier = self.throughput.training_seconds, self.values.get("training_seconds", 0.0)
        if earlier:
            speed = (speed * seconds + self.values["examples_per_second"] * earlier) / (seconds + earlier)
        self.values["training_seconds"] = seconds + earlier
        self.values["examples_per_second"] = speed
        if self.memory.peak_bytes is not None:
            peak = self.values.get("peak_memory_measured", 0.0)
            self.values["peak_memory_measured"] = max(peak, float(self.memory.peak_bytes))
        self.values |= evaluator.speeds(self._unknown)
        if self.pause is None and self.is_trial:
            self.values |= evaluator.measured_at_end("validation")
        for metric, step, value in self.curve.points:
            if not math.isfinite(value):  # a class is predicted of NaN as well, and scored
                raise DivergenceError(f"{metric} was {value} at step {step}")
        for objective in evaluator.objectives:
            if objective.name in self.values and not math.isfinite(self.values[objective.name]):
                raise DivergenceError(f"{objective.name} is {self.values[objective.name]}")

    def measure_merged(self) -> None:
        """Note how fast text is generated once adapters are merged; nothing may be attached."""
        if "tokens_per_second_merged" in self._unknown:
            speed = self.evaluator.merged_generation_speed(self.configuration)
            self.values["tokens_per_second_merged"] = speed

    @property
    def _unknown(self) -> frozenset[str]:
        """What is asked for and was not measured, as at a pause."""
        return self.evaluator.needed - self.values.keys() if self.is_trial else frozenset()

    def outcome(self, reason: str | None) -> Trained:
        """Return what came out."""
        evaluator = self.evaluator
        cost = self._meter.read(self.throughput.steps)
        if self.before is not None:
            cost += self.before.evaluation.cost
        status: Status = "complete"
        if self.violations:
            status, reason = "infeasible", reason or "; ".join(self.violations)
        elif reason is not None:
            status = "failed"
        elif self.pause is not None:
            monitor = evaluator.monitor.name
            status, reason = "paused", f"{monitor} {self.values[monitor]:.4f} after {cost.steps} steps"
        points = [CurvePoint(metric=name, step=step, value=value) for name, step, value in self.curve.points]
        evaluation = Evaluation(
            configuration=self.configuration,
            status=status,
            reason=reason,
            values={name: value for name, value in self.values.items() if math.isfinite(value)},
            curves=tuple(point for point in points if math.isfinite(point.value)),
            cost=cost,
            seed=self.seed,
            warm_start=self.warm_start,
            fidelity=1.0 if status == "complete" else cost.steps / evaluator.plan.total_steps,
        )
        if status == "paused" and self.pause is not None:
            return Trained(evaluation, paused=TrainingCheckpoint(evaluation=evaluation, state=self.pause))
        return Trained(evaluation, self.state if status == "complete" else None)


def best_weights(monitor: Objective) -> BestWeights:
    """Return what keeps the weights of a training's best validation."""
    return BestWeights(monitor.name, monitor.mode, restore_at_end=False)


def reason_of_failure(attempt: Callable[[], None]) -> str | None:
    """Run an attempt, and return in words what went wrong; None where nothing did."""
    try:
        attempt()
    except DivergenceError as error:
        return f"diverged: {error}"
    except SIGTERMException:
        raise
    except (Exception, SystemExit) as error:  # a model may call `sys.exit`
        first_line = (str(error).strip() or "no message").splitlines()[0]
        # torch's CPU allocator raises a RuntimeError with this text.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return f"out of memory: {first_line}"
        _logger.warning("A trial failed and the search goes on.", exc_info=True)
        return f"{type(error).__name__}: {first_line}"
    return None


def _fit(
    trainer: Trainer, module: FineTuning, evaluator: EvaluationContext, best: BestWeights, seed: int
) -> None:
    batches = evaluator.batches(seed, module.first_step)
    precision = evaluator.training.resolved_precision()
    lowered = evaluator.backbone.cached_casts.in_place(precision)
    with interruptible(), quiet_lightning(), lowered:
        trainer.fit(module, batches, evaluator.data.val_dataloader())
