"""One member of a pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from autopeft.callbacks import DivergenceError, StopOnDivergence
from autopeft.evaluation.run import EvaluationRun, Trained, best_weights, reason_of_failure
from autopeft.methods import attach
from autopeft.tasks.base import Batch
from autopeft.training.module import names_in_training
from autopeft.training.training_checkpoint import capture_state


class PackingError(ValueError):
    """The model computes in a way that packed trials cannot follow."""


@dataclass(eq=False)
class MemberRun(EvaluationRun):
    """An evaluation whose training is part of a pack's.

    Optimizer, schedule and metrics, and the callbacks for the learning curve, the best weights and divergence
    are those of a training alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        evaluator, backbone = self.evaluator, self.evaluator.backbone
        with (
            evaluator.own_dropout(),
            attach(backbone, self.configuration, self.seed) as attachment,
            evaluator.hidden_states.below(attachment),
        ):
            self._begin(attachment)
            self.peak_bytes = evaluator.peak_bytes(attachment)  # of its training alone
            self.cut = attachment.cut or 0
            self.parameters = dict(attachment.parameters)
            names = names_in_training(backbone.model, self.parameters)
        self.module = evaluator.module(self.configuration)
        self.module.metrics = evaluator.task.metric_collection().to(evaluator.device)
        self.module.model = _holder({names[name]: own for name, own in self.parameters.items()})
        made: Any = self.module.configure_optimizers()
        self.optimizer, self._scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
        # What callbacks read of a Trainer.
        self._trainer: Any = SimpleNamespace(
            sanity_checking=False, early_stopping_callback=None, optimizers=[self.optimizer], global_step=0
        )
        self._best = best_weights(evaluator.monitor)
        self._divergence = StopOnDivergence()
        self.reason: str | None = None  # why it failed
        self.cost = self._meter.read()  # its share

    def step(self, loss: Tensor, rows: int) -> None:
        """Take a step with the gradients at hand; a loss that has diverged makes the member fail."""
        if (largest := self.evaluator.training.gradient_clip) is not None:
            clip_grad_norm_(self.parameters.values(), largest)
        self.optimizer.step()
        self._scheduler.step()
        self._trainer.global_step += 1
        self.throughput.steps += 1
        self.throughput.examples += rows
        self.curve.on_train_batch_end(self._trainer, self.module, loss, None, 0)
        try:
            self._divergence.on_train_batch_end(self._trainer, self.module, loss, None, 0)
        except DivergenceError as error:
            self.reason = f"diverged: {error}"

    def validated(self) -> None:
        """Record the metrics that the module has collected, and keep the best weights."""
        self._trainer.callback_metrics = self.module.take_validated()
        self.curve.on_validation_end(self._trainer, self.module)
        self._best.on_validation_end(self._trainer, self.module)

    def end_training(self) -> None:
        """Check the trained weights, capture the state at a pause, and take the best weights."""
        try:
            self._divergence.on_fit_end(self._trainer, self.module)
        except DivergenceError as error:
            self.reason = f"diverged: {error}"
            return
        if self.end < self.evaluator.plan.total_steps:
            self.pause = capture_state(self._trainer, self.module, self._best)
        self._best.restore(self.module)
        self.values |= self._best.metrics
        self.state = {name: own.detach().cpu().clone() for name, own in self.parameters.items()}

    def verify(self, probe: Batch, logits: Tensor) -> None:
        """Compare the logits in the pack with those alone, and measure what is measured after training."""
        with attach(self.evaluator.backbone, self.configuration, self.seed) as attachment:
            attachment.load_state_dict(self.state or {})
            task = self.evaluator.task
            backbone = self.evaluator.backbone
            with torch.no_grad(), backbone.computing_in(backbone.own_precision):
                alone = task.predicted(task.forward(backbone.model, probe))
            tolerance = torch.finfo(alone.dtype).eps ** 0.5 * float(alone.abs().max().clamp(1e-3))
            if not float((logits - alone).abs().max()) <= tolerance:
                raise PackingError("a trial has other logits in the pack than alone")
            self.reason = reason_of_failure(self._measure)
        if self.reason is None:
            self.reason = reason_of_failure(self.measure_merged)

    def outcome(self, reason: str | None) -> Trained:
        """Return what came out, charged with the member's share of the compute."""
        self._meter.read()  # this time is shared
        return super().outcome(reason).with_added_cost(self.cost)


def _holder(parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """Return a module that has nothing but these parameters, named "model." and their names in it."""
    holder = nn.Module()
    for name, parameter in parameters.items():
        _, *path, local = name.split(".")
        parent = holder
        for child in path:
            if child not in dict(parent.named_children()):
                parent.add_module(child, nn.Module())
            parent = parent.get_submodule(child)
        parent.register_parameter(local, parameter)
    return holder
