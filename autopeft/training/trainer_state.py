"""The state of a training: taken where it pauses, and put back into another Trainer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from autopeft.callbacks import BestWeights
from autopeft.core.seeding import generator_states
from autopeft.training.module import FineTuning
from autopeft.training.training_checkpoint import TrainingState, flatten_state


@dataclass(eq=False)
class CaptureState(Callback):
    """Copy everything that a training has changed when a fit ends, before callbacks take their hooks off.

    Has to be the last of the Trainer's callbacks but for early stopping.

    Attributes:
        best: The callback that keeps the best validation's weights.
        callbacks: Callbacks whose state belongs to the training's.
        state: The state; None where early stopping has ended the training, or the fit was not ended.
    """

    best: BestWeights
    callbacks: Sequence[Callback] = ()
    state: TrainingState | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the state; raise a ValueError where a callback's cannot be kept."""
        check_states(self.callbacks)
        if not stopped_early(trainer):
            self.state = capture_state(trainer, pl_module, self.best, self.callbacks)


def check_states(callbacks: Sequence[Callback]) -> None:
    """Raise a ValueError where the state of a callback cannot be kept over a pause."""
    for callback in callbacks:
        try:
            flatten_state(callback.state_dict(), {})
        except ValueError as error:
            raise ValueError(f"{type(callback).__qualname__} cannot pause at a rung: {error}.") from None


def capture_state(
    trainer: Trainer, module: LightningModule, best: BestWeights, callbacks: Sequence[Callback] = ()
) -> TrainingState:
    """Return copies of everything that a training has changed, between its end and the Trainer's teardown.

    The arguments are those of `CaptureState`.
    """
    trainable = _trainable(module)
    (optimizer,) = trainer.optimizers
    early: dict[str, Any] = {}
    if trainer.early_stopping_callback is not None:
        early = trainer.early_stopping_callback.state_dict()
        early["best_score"] = float(early["best_score"])
    return TrainingState(
        step=trainer.global_step,
        weights={name: _copy(parameter) for name, parameter in trainable.items()},
        best_weights={name: tensor.cpu() for name, tensor in best.weights.items()},
        best=best.best,
        best_metrics=dict(best.metrics),
        optimizer={
            f"{name}|{entry}": _copy(value)
            for name, parameter in trainable.items()
            for entry, value in optimizer.state[parameter].items()
        },
        generators=generator_states(module.device),
        early_stopping=early,
        callbacks=[_copies(callback.state_dict()) for callback in callbacks],
    )


def restore_state(
    state: TrainingState,
    trainer: Trainer,
    module: FineTuning,
    best: BestWeights,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Put everything back before a fit, but what module (optimizer) and Trainer (steps) are made with."""
    trainable = _trainable(module)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(state.weights[name])
    best.weights = {name: tensor.to(trainable[name].device) for name, tensor in state.best_weights.items()}
    best.best, best.metrics = state.best, dict(state.best_metrics)
    for callback, callback_state in zip(callbacks, state.callbacks, strict=True):
        if callback_state:
            callback.load_state_dict(_copies(callback_state))
    if trainer.early_stopping_callback is not None:
        early = dict(state.early_stopping)
        early["best_score"] = torch.tensor(early["best_score"])
        trainer.early_stopping_callback.load_state_dict(early)
    torch.set_rng_state(state.generators["cpu"])
    if "cuda" in state.generators:
        torch.cuda.set_rng_state(state.generators["cuda"], module.device)


def stopped_early(trainer: Trainer) -> bool:
    """Return whether early stopping has ended the training."""
    stopping = trainer.early_stopping_callback
    return stopping is not None and stopping.wait_count >= stopping.patience


def _trainable(module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _copies(state: Any) -> Any:
    """Return the state of a callback with its tensors copied to the CPU."""
    return copy.deepcopy(move_data_to_device(state, torch.device("cpu")))
