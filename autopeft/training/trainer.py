"""The Trainer of a candidate: nothing that writes, prints or moves the resident backbone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import SingleDeviceStrategy

from autopeft.core.objectives import Objective
from autopeft.models.spread import devices_of
from autopeft.training.free_memory import return_free_memory
from autopeft.training.lightning_profiler import training_profiler
from autopeft.training.settings import Training


class ResidentStrategy(SingleDeviceStrategy):
    """A single device on which the model stays when training ends: Lightning would move it to the CPU.

    A model that lies on several devices stays there too; this one is then where its batches go.
    """

    def model_to_device(self) -> None:
        """Move the module; of one that lies on several devices, what has no parameters, as metrics."""
        assert self.model is not None
        if len(devices_of(self.model)) < 2:
            super().model_to_device()
            return
        for part in self.model.children():
            if not devices_of(part):
                part.to(self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Set up as Lightning does, which moves the optimizer's state to one device."""
        super().setup(trainer)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                moved = {
                    name: tensor.to(parameter.device) for name, tensor in state.items() if name != "step"
                }
                state.update(moved)

    def teardown(self) -> None:
        """Release what belongs to the training, and leave the module where it is."""
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class PartTrainer(Trainer):
    """A Trainer of one part of a training, whose callbacks see the steps of the whole.

    Args:
        first_step: Optimizer steps taken before this part.
        total_steps: Optimizer steps of the whole training; None for what Lightning estimates.
        options: What a Trainer takes.
    """

    def __init__(self, *, first_step: int = 0, total_steps: int | None = None, **options: Any) -> None:
        self._first_step = first_step
        self._total_steps = total_steps
        super().__init__(**options)

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, those before this part included."""
        return self._first_step + super().global_step

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps of the whole training, unless it is stopped early."""
        return super().estimated_stepping_batches if self._total_steps is None else self._total_steps


def build_trainer(
    training: Training,
    callbacks: Sequence[Callback],
    *,
    monitor: Objective,
    pieces: int | None = None,
    first_step: int = 0,
    total_steps: int | None = None,
) -> Trainer:
    """Return a Trainer without anything that writes, prints or looks for a cluster.

    Args:
        training: Bounds, precision and device.
        callbacks: Callbacks to run with; those of the training settings are not added.
        monitor: Metric that early stopping watches.
        pieces: Passes over a loader that stops by itself (see `SegmentedBatches`), each followed by a
            validation; None for the training's epochs.
        first_step: See `PartTrainer`.
        total_steps: See `PartTrainer`.
    """
    device = training.resolved_device()
    if training.patience is not None:
        callbacks = [*callbacks, EarlyStopping(monitor.name, mode=monitor.mode, patience=training.patience)]
    return PartTrainer(
        first_step=first_step,
        total_steps=total_steps,
        accelerator=device.type,
        devices=1,
        strategy=ResidentStrategy(device=device, accelerator=None),
        precision=training.resolved_precision(),
        max_epochs=training.epochs if pieces is None else pieces,
        max_steps=-1 if training.max_steps is None or pieces is not None else training.max_steps,
        check_val_every_n_epoch=training.validate_every if pieces is None else 1,
        gradient_clip_val=training.gradient_clip,
        callbacks=list(callbacks),
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
    """Let go of gradients and optimizer state, which the circles in a Trainer would keep for many trials.

    What the training has used otherwise goes back to the system.
    """
    for optimizer in trainer.optimizers:
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        optimizer.param_groups.clear()
    return_free_memory()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's notes on devices, loaders and finished fits: a search runs hundreds of fits."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    try:
        logger.setLevel(max(before, logging.WARNING))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
            yield
    finally:
        logger.setLevel(before)
