"""One batch through all that a trial does, so that a task's mistakes show, and where, before a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation
from autopeft.core.interrupts import interruptible
from autopeft.core.objectives import GENERATION_SPEEDS
from autopeft.core.profiling import whole_section
from autopeft.core.seeding import seeded
from autopeft.evaluation.context import EvaluationContext
from autopeft.evaluation.run import best_weights
from autopeft.methods import attach
from autopeft.tasks import Batch
from autopeft.training.trainer import build_trainer, dismantle, quiet_lightning
from autopeft.training.training_checkpoint import CaptureState, TrainingCheckpoint
from autopeft.training.trial_callbacks import new_callbacks


@whole_section("rehearse")
def rehearse(evaluator: EvaluationContext, configuration: Configuration) -> None:
    """Train a configuration for one step, validate it on one batch, and keep and read its state.

    The test split is not read, and the backbone is afterwards what it was before.

    Raises:
        ValueError: Something failed, or gave what a trial cannot use: says what, and what was expected.
    """
    name, data = type(evaluator.task).__name__, evaluator.data
    with (
        evaluator.own_dropout(),
        attach(evaluator.backbone, configuration, evaluator.seed) as attachment,
        seeded(evaluator.seed, evaluator.backbone.devices),
    ):
        with naming(f"{name}'s training data"):
            loader = data.train_dataloader(evaluator.seed)
            if not hasattr(loader.batch_sampler, "set_epoch"):
                raise ValueError("expected a batch sampler with set_epoch, such as LoaderData makes.")
            if evaluator.training.accumulate > 1 and not hasattr(loader.batch_sampler, "joined"):
                raise ValueError("for accumulate, expected a batch sampler such as LoaderData makes.")
            batch = _first(loader)
        with naming(f"{name}'s validation data"):
            validation = _first(data.val_dataloader())
        _check_model(evaluator)
        is_trained = bool(attachment.parameters)
        _check_outputs(evaluator, batch, is_trained=is_trained)
        _check_words(evaluator)
        _check_generation(evaluator)
        if is_trained:
            with naming(f"A training step of {name}"):
                _step(evaluator, configuration, batch, validation)


@contextmanager
def naming(what: str, given: str = "") -> Iterator[None]:
    """Turn what goes wrong in a `with` block into a ValueError that says where, and with what."""
    try:
        yield
    except Exception as error:
        (line, *_) = str(error).strip().splitlines() or ["no message"]
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}{given and f', given {given}'}: {kind}{line}") from error


def _first(loader: Iterable[Any]) -> Batch:
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("expected at least one batch, got none.")
    for key, value in batch.items() if isinstance(batch, Mapping) else [("a batch", batch)]:
        if not isinstance(value, Tensor):
            raise ValueError(f"a batch maps names to tensors, got {key} as a {type(value).__name__}.")
    return dict(batch)


def _check_model(evaluator: EvaluationContext) -> None:
    """Let the task say whether the model can compute its batches."""
    backbone, precision = evaluator.backbone, evaluator.training.resolved_precision()
    with naming(type(evaluator.task).__name__), torch.no_grad(), backbone.computing_in(precision):
        evaluator.task.check_model(backbone.model.eval(), evaluator.data)


def _check_outputs(evaluator: EvaluationContext, batch: Batch, *, is_trained: bool) -> None:
    """Check what each member of the task gives for a batch."""
    task, device = evaluator.task, evaluator.device
    name, batch = type(task).__name__, {key: tensor.to(device) for key, tensor in batch.items()}
    given = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in batch.items())
    with evaluator.backbone.computing_in(evaluator.training.resolved_precision()):
        with naming(f"{name}.forward", given):
            output = task.forward(evaluator.backbone.model, batch)
        with naming(f"{name}.predicted"):
            task.predicted(output)
        with naming(f"{name}.loss", given):
            loss = task.loss(output, batch)
            _check_number(loss, "the mean loss of the batch")
            if is_trained and not loss.requires_grad:
                raise ValueError("expected a gradient, got a loss that does not depend on what is trained.")
        with naming(f"{name}.weight", given):
            weight = task.weight(batch)
            _check_number(weight, "what the batch's loss counts in a mean")
            if not weight > 0:
                raise ValueError(f"expected a number above 0, got {weight.item()}.")
        with naming(f"{name}.metric_collection"):
            metrics = task.metric_collection()
            if not isinstance(metrics, MetricCollection):
                raise ValueError(f"expected a MetricCollection, got a {type(metrics).__name__}.")
            metrics = metrics.to(device)
        with naming(f"{name}.update_metrics", given):
            task.update_metrics(metrics, output, batch, loss)
            if idle := [str(key) for key, metric in metrics.items() if not metric.update_called]:
                raise ValueError(f"expected an update of each metric, got none of {', '.join(idle)}.")
        with naming(f"{name}.metric_collection"):
            found = metrics.compute()
            names = [metric.name for metric in task.metrics if not metric.at_end]
            if found.keys() != set(names):
                raise ValueError(
                    f"expected the keys {', '.join(names)} of `metrics`, got {', '.join(found)}."
                )
            for key, value in found.items():
                _check_number(value, key, finite=False)  # on one batch a correlation may have no value


def _check_number(value: Any, what: str, *, finite: bool = True) -> None:
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"expected {what} as a tensor of one number, got {got}.")
    if finite and not value.isfinite():
        raise ValueError(f"expected {what} to be finite, got {value.item()}.")


def _check_words(evaluator: EvaluationContext) -> None:
    """Check what a task says of itself and of its metrics."""
    task, name = evaluator.task, type(evaluator.task).__name__
    with naming(f"{name}.identity"):
        identity = task.identity()
        if not all(isinstance(text, str) for pair in identity.items() for text in pair):
            raise ValueError(f"expected texts by name, got {identity!r}.")
    for metric in evaluator.objectives:
        if metric.is_metric:
            with naming(f"{name}.trivial_score", metric.name):
                score = task.trivial_score(metric.name, evaluator.data)
                if not math.isfinite(score):
                    raise ValueError(f"expected a finite number, got {score!r}.")


def _check_generation(evaluator: EvaluationContext) -> None:
    """Generate a token, where that is needed when a training ends: trials would all fail there."""
    task, needed = evaluator.task, evaluator.needed
    ends = {metric.name for metric in task.metrics if metric.at_end}
    generates = {objective.name for objective in task.objectives} & GENERATION_SPEEDS.keys()
    if generates and needed & (ends | generates):
        evaluator.backbone.model.eval()
        precision = evaluator.training.resolved_precision()
        with (
            naming(f"Generating with {evaluator.backbone.name}"),
            torch.inference_mode(),
            evaluator.backbone.computing_in(precision),
        ):
            task.generate_tokens(evaluator.backbone.model, evaluator.data, 1)


def _step(
    evaluator: EvaluationContext, configuration: Configuration, batch: Batch, validation: Batch
) -> None:
    """Take one step as a trial does, and pause."""
    module = evaluator.module(configuration)
    best, users = best_weights(evaluator.monitor), new_callbacks(evaluator.training.callbacks, module)
    capture = CaptureState(best, users)
    module.train()
    with ExitStack() as ending:
        ending.callback(module.eval)
        ending.enter_context(interruptible())
        ending.enter_context(quiet_lightning())
        precision = evaluator.training.resolved_precision()
        ending.enter_context(evaluator.backbone.cached_casts.in_place(precision))
        trainer = build_trainer(
            evaluator.training,
            [*users, best, capture],
            monitor=evaluator.monitor,
            pieces=1,
            total_steps=evaluator.plan.total_steps,
        )
        ending.callback(dismantle, trainer)
        parts = [batch] * 2 if evaluator.training.accumulate > 1 else batch
        rows: Any = [parts], [validation]  # data sets of one; Lightning would take a list for several loaders
        trainer.fit(module, DataLoader(rows[0], batch_size=None), DataLoader(rows[1], batch_size=None))
    assert capture.state is not None  # one validation is too early to stop
    paused = Evaluation(configuration=configuration, status="paused", reason="rehearsed")
    with TemporaryDirectory() as folder:
        path = Path(folder, "rehearsed.safetensors")
        TrainingCheckpoint(evaluation=paused, state=capture.state).save(path)
        if TrainingCheckpoint.load(path) is None:
            raise ValueError("expected the state of the training to be read as it was written.")
