"""Take the state of a training out of Lightning's Trainer, and put it back into another."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from autopeft.callbacks import BestWeights
from autopeft.core.seeding import generator_states
from autopeft.training.settings import FineTuning
from autopeft.training.training_checkpoint import TrainingState


def capture_state(trainer: Trainer, module: FineTuning, best: BestWeights) -> TrainingState:
    """Return copies of everything that a training has changed."""
    trainable = {name: one for name, one in module.named_parameters() if one.requires_grad}
    (optimizer,) = trainer.optimizers
    early: dict[str, Any] = {}
    if trainer.early_stopping_callback is not None:
        early = trainer.early_stopping_callback.state_dict()
        early["best_score"] = float(early["best_score"])
    return TrainingState(
        step=trainer.global_step,
        weights={name: one.detach().cpu().clone() for name, one in trainable.items()},
        best_weights={name: one.cpu() for name, one in best.weights.items()},
        best=best.best,
        best_metrics=dict(best.metrics),
        optimizer={
            f"{name}|{entry}": value.detach().cpu().clone()
            for name, parameter in trainable.items()
            for entry, value in optimizer.state[parameter].items()
        },
        generators=generator_states(module.device),
        early_stopping=early,
    )


def restore_state(state: TrainingState, trainer: Trainer, module: FineTuning, best: BestWeights) -> None:
    """Put everything back but the optimizer's tensors, which the module fills in when it makes it."""
    trainable = {name: one for name, one in module.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(state.weights[name])
    best.weights = {name: one.to(trainable[name].device) for name, one in state.best_weights.items()}
    best.best, best.metrics = state.best, dict(state.best_metrics)
    if trainer.early_stopping_callback is not None:
        early = dict(state.early_stopping)
        early["best_score"] = torch.tensor(early["best_score"])
        trainer.early_stopping_callback.load_state_dict(early)
    torch.set_rng_state(state.generators["cpu"])
    if "cuda" in state.generators:
        torch.cuda.set_rng_state(state.generators["cuda"], module.device)
    # As Lightning does it when it restores a checkpoint: callbacks see the steps of the whole training.
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress
    progress.optimizer.step.total.completed = state.step


def stopped_early(trainer: Trainer) -> bool:
    """Return whether early stopping has ended the training."""
    stopping = trainer.early_stopping_callback
    return stopping is not None and stopping.wait_count >= stopping.patience
