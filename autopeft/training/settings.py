"""How a candidate is trained: the fixed settings, the LightningModule, and the Trainer around it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors import callback_connector
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.evaluation import VALIDATION_LOSS
from autopeft.core.objectives import parse_quantity
from autopeft.core.precision import Precision, quickest_precision
from autopeft.tasks import Task
from autopeft.tasks.batch import LABELS, model_inputs
from autopeft.training.lightning_profiler import training_profiler

Serve = Callable[[Mapping[str, Tensor]], AbstractContextManager[Any]]
FrozenPrefixMode = Literal["train", "eval", "cached"]
Device = Literal["auto", "cpu", "cuda"]
TrainingPrecision = Literal["auto", "32-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every candidate of a search has in common; what differs stands in its configuration.

    Attributes:
        epochs: Passes over the training split.
        max_steps: Stop after this many optimizer steps at the latest; None for no bound.
        batch_size: Examples a step.
        warmup_share: Share of the steps in which the learning rate rises; it then falls linearly to 0.
        gradient_clip: Largest norm of the gradient; None for no bound.
        patience: Stop after this many validations without improvement; None to train to the end.
        validate_every: Epochs between validations. The best validation's weights are kept.
        device: "auto" takes CUDA where there is one.
        precision: "auto" is bf16-mixed on CUDA devices and processors that multiply it, 32-true elsewhere.
        frozen_blocks: How embeddings and blocks below the lowest adapter are run in training. "train": with
            dropout. "eval": without, so that they give the same in every epoch and trial. "cached": as
            "eval", with their hidden states kept on disk where that saves time; results differ from "eval" in
            rounding alone.
        prefix_cache: Bytes that kept hidden states may take on disk, as in "8 GiB".

    Raises:
        ValueError: A value is out of its range.
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    warmup_share: float = 0.06
    gradient_clip: float | None = 1.0
    patience: int | None = None
    validate_every: int = 1
    device: Device = "auto"
    precision: TrainingPrecision = "auto"
    frozen_blocks: FrozenPrefixMode = "cached"
    prefix_cache: int | str = field(default="8 GiB", compare=False)

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "patience", "validate_every"):
            value = getattr(self, name)
            optional = name in ("max_steps", "patience")
            if value is None and optional:
                continue
            check_whole(name, value, least=1)
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share is a share in [0, 1], got {self.warmup_share!r}.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip is above 0 or None, got {self.gradient_clip!r}.")
        if self.validate_every > self.epochs:
            raise ValueError(
                f"validate_every={self.validate_every} is beyond the {self.epochs} epochs: "
                "a candidate would never be validated."
            )
        choices_of = {"device": Device, "precision": TrainingPrecision, "frozen_blocks": FrozenPrefixMode}
        for name, choices in choices_of.items():
            if getattr(self, name) not in get_args(choices):
                raise unknown_choice(name, str(getattr(self, name)), get_args(choices))
        parse_quantity(self.prefix_cache, "bytes")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no CUDA device: use 'auto' or 'cpu'.")

    def resolved_device(self) -> torch.device:
        """Return the device candidates are trained on."""
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())  # Lightning asks for the index

    def resolved_precision(self) -> Precision:
        """Return the precision candidates are trained in."""
        return quickest_precision(self.resolved_device()) if self.precision == "auto" else self.precision

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of a training that is not stopped early."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)


class FineTuning(LightningModule):
    """Train whatever requires gradients in a model with a task head.

    Args:
        model: Returns an object with `logits`, of shape (batch, labels), for the batch's tensors.
        task: Gives the loss and the metrics.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay.
        warmup_share: Share of the steps with a rising learning rate.
        total_steps: Steps after which the learning rate is 0.
        first_step: Steps already taken.
        optimizer_state: The optimizer's tensors at that step, by "parameter|name"; None at the start.
        serve: Gives a context that a batch's forward pass is run in, as `TrialHiddenStates.serve` does.
        metrics: The task's, which are reset; None to make them anew.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        learning_rate: float,
        weight_decay: float,
        warmup_share: float,
        total_steps: int,
        first_step: int = 0,
        optimizer_state: Mapping[str, Tensor] | None = None,
        serve: Serve = nullcontext,
        metrics: MetricCollection | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = math.ceil(warmup_share * total_steps)
        self.total_steps = total_steps
        self.first_step = first_step
        self.serve = serve
        self.optimizer_state = optimizer_state or {}
        self.metrics = task.metric_collection() if metrics is None else metrics
        self.metrics.reset()  # a training that failed may have left rows
        self._validated: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits, of shape (batch, labels)."""
        with self.serve(batch):
            logits: Tensor = self.model(**model_inputs(batch)).logits
        return logits

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch."""
        return self.task.loss(self(batch), batch[LABELS])

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Add one batch to the metrics and the loss."""
        self.add_validated(self(batch), batch[LABELS])

    def add_validated(self, logits: Tensor, labels: Tensor) -> None:
        """Add the logits (rows, labels) of one validation batch to the metrics and the loss."""
        self.metrics.update(logits, labels)
        self._validated.append((logits, labels))

    def take_validated(self) -> dict[str, Tensor]:
        """Return the metrics and the loss of all rows that were added, by name, and forget these.

        The loss is that of all rows at once: with class weights, batches' losses have no simple mean.
        """
        logits, labels = map(torch.cat, zip(*self._validated, strict=True))
        found = {**self.metrics.compute(), VALIDATION_LOSS: self.task.loss(logits, labels)}
        self.metrics.reset()
        self._validated = []
        return found

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and the loss under their names."""
        self.log_dict(self.take_validated())

    def test_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        """Add one batch to the metrics."""
        self.metrics.update(self(batch), batch[LABELS])

    def on_test_epoch_end(self) -> None:
        """Log the metrics under their names."""
        self.log_dict(self.metrics.compute())
        self.metrics.reset()

    def configure_optimizers(self) -> Any:
        """Return AdamW over the trainable parameters, with linear warm-up and decay a step."""
        trainable = {name: one for name, one in self.named_parameters() if one.requires_grad}
        optimizer = torch.optim.AdamW(
            trainable.values(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        for key, tensor in self.optimizer_state.items():
            name, _, entry = key.rpartition("|")
            parameter = trainable[name]
            # AdamW counts steps on the CPU.
            device = tensor.device if entry == "step" else parameter.device
            optimizer.state[parameter][entry] = tensor.to(device, copy=True)
        scheduler = LambdaLR(optimizer, self._learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _learning_rate_factor(self, step: int) -> float:
        step += self.first_step
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))


def names_in_training(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return the names that parameters of a model have in a `FineTuning` of it, by those they are given."""
    names = {id(one): f"model.{name}" for name, one in model.named_parameters()}
    return {name: names[id(one)] for name, one in parameters.items()}


class ResidentStrategy(SingleDeviceStrategy):
    """A single device on which the model stays when training ends.

    Lightning moves the module to the CPU at every teardown, which for a resident backbone is a copy of
    all pretrained weights back and forth a trial.
    """

    def teardown(self) -> None:
        """Release what belongs to the training, and leave the module where it is."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def build_trainer(
    training: Training, callbacks: Sequence[Callback], *, monitor: str, pieces: int | None = None
) -> Trainer:
    """Return a Trainer without anything that writes, prints or looks for a cluster.

    Args:
        training: Bounds, precision and device.
        callbacks: Callbacks to run with.
        monitor: Metric that early stopping watches (maximised).
        pieces: Passes over a loader that stops by itself (see `SegmentedBatches`), each with a validation
            behind it; None for the training's epochs.
    """
    device = training.resolved_device()
    stopping: list[Callback] = []
    if training.patience is not None:
        stopping.append(EarlyStopping(monitor, mode="max", patience=training.patience))
    with _no_external_callbacks():
        return Trainer(
            accelerator=device.type,
            devices=1,
            strategy=ResidentStrategy(device=device, accelerator=None),
            precision=training.resolved_precision(),
            max_epochs=training.epochs if pieces is None else pieces,
            max_steps=-1 if training.max_steps is None or pieces is not None else training.max_steps,
            check_val_every_n_epoch=training.validate_every if pieces is None else 1,
            gradient_clip_val=training.gradient_clip,
            callbacks=[*callbacks, *stopping],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=True,
            profiler=training_profiler(),
        )


def dismantle(trainer: Trainer) -> None:
    """Take a Trainer apart for good: its parts refer to each other in circles.

    Else gradients and the optimizer's state would stay until Python next looks for circles, which may be
    hundreds of trials later.
    """
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
        optimizer.param_groups.clear()
    vars(trainer).clear()


@contextmanager
def _no_external_callbacks() -> Iterator[None]:
    """Keep Lightning from asking every installed package for callbacks: half the time a Trainer takes."""
    connector: Any = callback_connector
    search = connector._load_external_callbacks
    connector._load_external_callbacks = lambda group: []
    try:
        yield
    finally:
        connector._load_external_callbacks = search


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence what Lightning says of devices, loaders and finished fits: a search makes hundreds."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    quiet = before >= logging.WARNING  # by a call around this one: changing a level takes a millisecond
    if not quiet:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
            yield
    finally:
        if not quiet:
            logger.setLevel(before)
