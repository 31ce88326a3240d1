"""What all evaluations of a search share: the resident backbone, the data, the settings, the counters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torchmetrics import MetricCollection

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import Constraint, Objective
from autopeft.core.precision import Precision
from autopeft.core.profiling import section
from autopeft.evaluation.frozen_blocks.cache import HiddenStateCache
from autopeft.evaluation.memory.counter import MemoryCounter, count_flops
from autopeft.methods import Attachment, unmergeable
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadPart
from autopeft.models.own_dropout import own_dropout
from autopeft.tasks import Task, TaskData
from autopeft.tasks.base import SplitName
from autopeft.training.module import FineTuning
from autopeft.training.settings import Training
from autopeft.training.trainer import build_trainer, dismantle, quiet_lightning
from autopeft.training.training_checkpoint import TrainingCheckpoint, check_states
from autopeft.training.trial_callbacks import new_callbacks
from autopeft.training.validation_schedule import SegmentedBatches, ValidationSchedule

_Result = TypeVar("_Result")
_LATENCY_REPEATS = 10
_SPEED_REPEATS = 3
_TIMED_TOKENS = 16  # generated a row and repeat


class _CalledError(Exception):
    """Ends a forward pass that begins, with its arguments."""


@dataclass(frozen=True)
class Compute:
    """What "auto" came to in this process: two processes may train trials of one search if these agree.

    Attributes:
        device: Its type.
        precision: That trials are trained in.
        dtype: Of the frozen weights.
        fingerprint: Of the backbone; empty where its weights were quantised, which devices round differently.
    """

    device: str = field(compare=False)
    precision: Precision
    dtype: str
    fingerprint: str

    def difference(self, other: Compute) -> str:
        """Say how another process trains otherwise than this one counts, and what settles it."""
        mends = []
        if other.dtype != self.dtype:
            mends.append(f'dtype="{other.dtype}"')
        if other.precision != self.precision:
            mends.append(f'training=Training(precision="{other.precision}")')
        if not mends:
            return (
                "it has loaded another backbone than this process: have the same files on all hosts, or give "
                "the search a loaded model, which is sent to them."
            )
        return (
            f"it trains with {other.dtype} weights in {other.precision} on its {other.device}, but this "
            f"process counts with {self.dtype} weights in {self.precision} on its {self.device}. Say which "
            f"it is to be, as by Search({', '.join(mends)})."
        )


class EvaluationContext:
    """What all evaluations of a search share.

    Args:
        backbone: Kept in memory; bit-identical between evaluations.
        task: Gives data, loss and metrics.
        training: What every candidate has in common.
        objectives: What to measure; the first metric among them decides which weights are kept.
        constraints: Bounds checked before training.
        rungs: Shares of the training, in (0, 1), after which it may pause.
        seed: Seed of initial weights, shuffling and dropout.
        cache: Folder for tokenised data and hidden states; None to keep the former in memory alone.

    Attributes:
        monitor: The metric that decides which weights are kept.
        needed: Names of the values that an objective or a constraint asks for.
        steps_per_epoch: Optimizer steps an epoch.

    Raises:
        ValueError: The training has too few steps for its rungs, or the state of a callback cannot be kept at
            a rung.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        training: Training,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        rungs: Sequence[float] = (),
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        self.backbone = backbone
        self.task = task
        is_low = backbone.own_precision == "bf16-mixed"
        self.training = replace(training, precision="bf16-mixed") if is_low else training
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        wanted = (*objectives, *(constraint.objective for constraint in constraints))
        self.needed = frozenset(objective.name for objective in wanted)
        self.seed = seed
        self._rungs, self._cache = rungs, cache
        self.monitor = next(each for each in objectives if each.is_metric and not each.at_end)
        self.device = training.resolved_device()
        if len(backbone.devices) == 1:
            nn.Module.to(backbone.model, self.device)
        elif self.device != backbone.devices[0]:
            raise ValueError(
                f"{backbone.name} lies on {', '.join(map(str, backbone.devices))}, but trials are trained on "
                f"{self.device}: leave Training.device as it is, or device_map out."
            )
        if training.gradient_checkpointing:
            backbone.enable_checkpointing()
        with section("tokenise"):
            self.data = task.data(backbone.processor, batch_size=training.part_size, seed=seed, cache=cache)
        if not isinstance(self.data, TaskData):
            got = f"{type(task).__name__}.data returned a {type(self.data).__name__}"
            raise ValueError(f"{got}, expected a TaskData such as LoaderData.")
        self.steps_per_epoch = training.steps_per_epoch(self.data.batches_per_epoch)
        self.plan = ValidationSchedule.of(training, self.steps_per_epoch, rungs)
        if rungs:
            check_states(new_callbacks(training.callbacks))
        self._memory = MemoryCounter(backbone.model)
        self._merged_speeds: dict[Configuration, float] = {}
        folder = None if cache is None else cache / "hidden_states"
        self.hidden_states = HiddenStateCache(backbone, task, self.data, self.training, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how another process makes its own: data are loaded there, and a backbone that has a name."""
        backbone = self.backbone.load_again or self.backbone
        shared = (backbone, self.backbone.head_part, self.task, self.training)
        settings: dict[str, Any] = {"rungs": self._rungs, "seed": self.seed, "cache": self._cache}
        make = partial(type(self)._elsewhere, **settings)
        return make, (*shared, self.objectives, self.constraints), self.hidden_states.trials

    @classmethod
    def _elsewhere(
        cls,
        backbone: Backbone | Callable[..., Backbone],
        head_part: HeadPart,
        task: Task,
        training: Training,
        *measured: Any,
        **settings: Any,
    ) -> Self:
        if not isinstance(backbone, Backbone):
            backbone = backbone(device=training.resolved_device())
            backbone.train_head(head_part)
        return cls(backbone, task, training, *measured, **settings)

    def __setstate__(self, trials: int | None) -> None:
        self.hidden_states.expect(trials)

    @property
    def compute(self) -> Compute:
        """With what trials are trained here."""
        backbone = self.backbone
        return Compute(
            device=self.device.type,
            precision=self.training.resolved_precision(),
            dtype=str(backbone.model.dtype).removeprefix("torch."),
            fingerprint="" if backbone.quantized else backbone.fingerprint,
        )

    def batches(self, seed: int, step: int = 0) -> SegmentedBatches:
        """Return the training batches from a step on, to the stops of the plan."""
        loader = self.data.train_dataloader(seed)
        return SegmentedBatches(loader, self.plan, step, self.training.accumulate)

    def own_dropout(self) -> AbstractContextManager[None]:
        """Return the context of a training, without the model's own dropout where the task leaves it out."""
        return own_dropout(self.backbone.model, is_on=self.task.trains_with_dropout)

    @section("count")
    def attached_costs(self, attachment: Attachment) -> dict[str, float]:
        """Return every cost that is exact before training, of what is attached now."""
        values = self.sizes(attachment)
        if "peak_memory" in self.needed:
            values["peak_memory"] = float(self.peak_bytes(attachment))
        return values

    def sizes(self, attachment: Attachment) -> dict[str, float]:
        """Return the exact costs of what is attached now that do not depend on how it is trained."""
        parameters = attachment.trainable_parameters
        values = {
            "trainable_parameters": float(parameters),
            "adapter_parameters": float(parameters - self.backbone.head_parameters),
            "adapter_bytes": float(sum(each.nbytes for each in attachment.tensors.values())),
        }
        if "forward_flops" in self.needed:
            values["forward_flops"] = float(
                count_flops(self.backbone.model, self.data.largest_batch(), self.task)
            )
        return values

    def peak_bytes(self, attachment: Attachment) -> int:
        """Return the peak bytes of a training of what is attached now, counted."""
        counted = self._memory.count(
            self.data.largest_batch(),
            self.task,
            precision=self.training.resolved_precision(),
            accumulate=self.training.accumulate,
            attached=attachment.structure,
        )
        return counted + self.backbone.kept_bytes

    def module(self, configuration: Configuration, paused: TrainingCheckpoint | None = None) -> FineTuning:
        """Return the LightningModule that trains what is attached, from its start or from a pause on.

        One at a time: they share the task's metrics.
        """
        return FineTuning(
            self.backbone.model,
            self.task,
            learning_rate=configuration.learning_rate,
            weight_decay=configuration.weight_decay,
            warmup_share=self.training.warmup_share,
            total_steps=self.plan.total_steps,
            first_step=0 if paused is None else paused.step,
            optimizer_state=None if paused is None else paused.state.optimizer,
            serve=self.hidden_states.serve,
            metrics=self._metrics,
        )

    @cached_property
    def _metrics(self) -> MetricCollection:
        """The task's metrics, made once: they take as long as the rest of a training's set-up."""
        return self.task.metric_collection()

    @section("evaluate")
    def measured_at_end(self, split: SplitName) -> dict[str, float]:
        """Return the metrics that are measured when a training has ended, of what is attached now."""
        if not any(metric.at_end and metric.name in self.needed for metric in self.task.metrics):
            return {}
        model = self.backbone.model
        model.eval()
        with torch.inference_mode(), self.backbone.computing_in(self.training.resolved_precision()):
            return self.task.measure_at_end(model, self.data, split)

    def batch_metrics(
        self, configuration: Configuration, split: SplitName, callbacks: Sequence[Callback] = ()
    ) -> dict[str, float]:
        """Return a split's metrics by what is attached now, without those of `measured_at_end`."""
        module = self.module(configuration)
        module.eval()
        casts = self.backbone.cached_casts.in_place(self.training.resolved_precision())
        with quiet_lightning(), casts, ExitStack() as ending:
            trainer = build_trainer(self.training, callbacks, monitor=self.monitor)
            ending.callback(dismantle, trainer)
            if split == "test":
                (metrics,) = trainer.test(module, self.data.test_dataloader(), verbose=False)
            else:
                (metrics,) = trainer.validate(module, self.data.val_dataloader(), verbose=False)
        return {name: float(value) for name, value in metrics.items()}

    def model_call(self) -> dict[str, Tensor]:
        """Return the tensors that the task calls the model with for the largest batch, by argument.

        Raises:
            ValueError: The task's forward pass does not call the model.
        """
        model = self.backbone.model
        names = list(signature(model.forward).parameters)

        def stop(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            raise _CalledError(dict(zip(names, inputs, strict=False)) | named)

        batch = {name: tensor.to(self.device) for name, tensor in self.data.largest_batch().items()}
        with model.register_forward_pre_hook(stop, with_kwargs=True):
            try:
                self.task.forward(model, batch)
            except _CalledError as call:
                (given,) = call.args
                return {name: value for name, value in given.items() if isinstance(value, Tensor)}
        raise ValueError(f"{type(self.task).__name__}.forward does not call the model it is given.")

    def speeds(self, unknown: Collection[str]) -> dict[str, float]:
        """Return those of the speeds that are asked for, of what is attached now."""
        measures = {"inference_latency": self.latency, "tokens_per_second": self.generation_speed}
        return {name: measure() for name, measure in measures.items() if name in unknown}

    @section("evaluate")
    def latency(self) -> float:
        """Return the median seconds of a forward pass over the largest batch, as attached now."""
        model = self.backbone.model
        batch = {name: tensor.to(self.device) for name, tensor in self.data.largest_batch().items()}
        runs = self._timed(lambda: self.task.forward(model, batch), _LATENCY_REPEATS)
        return statistics.median(seconds for seconds, _ in runs)

    @section("evaluate")
    def generation_speed(self) -> float:
        """Return the median of the tokens a second that are generated, as attached now."""
        model, data = self.backbone.model, self.data
        runs = self._timed(lambda: self.task.generate_tokens(model, data, _TIMED_TOKENS), _SPEED_REPEATS)
        return statistics.median(tokens / seconds for seconds, tokens in runs)

    def merged_generation_speed(self, configuration: Configuration) -> float:
        """Return the tokens a second with what can be merged in the weights; nothing may be attached.

        What is merged computes nothing of its own, so the rest of the configuration is attached alone. It is
        measured once for all configurations that share it: else noise would tell them apart.
        """
        rest = unmergeable(configuration)
        if rest not in self._merged_speeds:
            with Attachment(self.backbone, rest, self.seed):
                self._merged_speeds[rest] = self.generation_speed()
        return self._merged_speeds[rest]

    def _timed(self, work: Callable[[], _Result], repeats: int) -> list[tuple[float, _Result]]:
        """Return the seconds and the results of work without gradients, done once more to begin with."""
        runs = []
        self.backbone.model.eval()
        with torch.inference_mode(), self.backbone.computing_in(self.backbone.own_precision):
            for _ in range(repeats + 1):
                started = time.perf_counter()
                result = work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                runs.append((time.perf_counter() - started, result))
        return runs[1:]
