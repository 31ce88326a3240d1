"""A training that pauses at a rung: its state is taken, kept in a file, and put back into another Trainer."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from autopeft.callbacks import BestWeights
from autopeft.core.durable_files import load_tensors, save_tensors, unless_damaged
from autopeft.core.evaluation import Evaluation
from autopeft.core.profiling import section
from autopeft.core.seeding import generator_states, restore_generators
from autopeft.models.spread import devices_of
from autopeft.training.adapter_checkpoints import TrialFiles

_META = "autopeft"
_GROUPS = ("weights", "best_weights", "optimizer", "generators", "kept")
_CALLBACKS = "callbacks"
_TENSOR = "tensor"
_TUPLE = "tuple"
_ITEMS = "items"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a training changes, between two optimizer steps.

    Attributes:
        step: Optimizer steps taken.
        weights: Trainable tensors by the module's names.
        best_weights: Those of the best validation so far.
        best: Value of the watched metric there.
        best_metrics: Every metric of that validation.
        optimizer: The optimizer's tensors, by "parameter|name".
        generators: States of the random generators, as `generator_states` names them.
        early_stopping: State of the early-stopping callback; empty without one.
        callbacks: State of each of the user's callbacks.
        kept: Tensors that are kept with the adapters and not trained, as an `Attachment` names them.
    """

    step: int
    weights: Mapping[str, Tensor]
    best_weights: Mapping[str, Tensor]
    best: float
    best_metrics: Mapping[str, float]
    optimizer: Mapping[str, Tensor]
    generators: Mapping[str, Tensor]
    early_stopping: Mapping[str, Any]
    callbacks: Sequence[Any] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingCheckpoint:
    """A training that can go on as if it had never paused.

    Attributes:
        evaluation: What came out so far.
        state: What it goes on from.
    """

    evaluation: Evaluation
    state: TrainingState

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    def save(self, path: Path) -> None:
        """Write it as safetensors; the file is there whole or not at all.

        Raises:
            OSError: The disk is full, or the folder cannot be written to.
        """
        state = dict(vars(self.state))
        tensors: dict[str, Tensor] = {
            f"{group}/{name}": tensor for group in _GROUPS for name, tensor in state.pop(group).items()
        }
        state[_CALLBACKS] = flatten_state(list(self.state.callbacks), tensors)
        plain = {"evaluation": self.evaluation.to_dict(), "state": state}
        save_tensors(path, tensors, {_META: json.dumps(plain)})

    @classmethod
    def load(cls, path: Path) -> TrainingCheckpoint | None:
        """Read what `save` wrote; None where the file is missing or damaged."""

        def read() -> TrainingCheckpoint | None:
            kept = load_tensors(path)
            return None if kept is None else cls._of(*kept)

        return unless_damaged(path, read)

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> TrainingCheckpoint:
        plain = json.loads(metadata[_META])
        groups: dict[str, Any] = {group: {} for group in (*_GROUPS, _CALLBACKS)}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        callbacks = _unflatten(plain["state"].pop(_CALLBACKS), groups.pop(_CALLBACKS))
        state = TrainingState(**plain["state"], **groups, callbacks=callbacks)
        return cls(evaluation=Evaluation.from_dict(plain["evaluation"]), state=state)


def flatten_state(state: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the state of a callback as plain data for JSON, and move its tensors into `tensors`.

    It may hold tensors, numbers, texts, None, and mappings (of texts), lists and tuples of these: something
    else raises a ValueError.
    """
    if isinstance(state, Tensor):
        name = str(len(tensors))
        tensors[f"{_CALLBACKS}/{name}"] = state
        return {_TENSOR: name}
    if isinstance(state, Mapping) and all(isinstance(key, str) for key in state):
        return {_ITEMS: {key: flatten_state(value, tensors) for key, value in state.items()}}
    if isinstance(state, tuple):
        return {_TUPLE: [flatten_state(value, tensors) for value in state]}
    if isinstance(state, list):
        return [flatten_state(value, tensors) for value in state]
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise ValueError(
        f"its state holds {state!r}, expected tensors, numbers, texts, and lists, tuples and mappings with "
        "text keys of these"
    )


def _unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_unflatten(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(_unflatten(value, tensors) for value in plain[_TUPLE])
    return {key: _unflatten(value, tensors) for key, value in plain[_ITEMS].items()}


class TrainingCheckpoints(TrialFiles):
    """The paused trainings of a search, one file a trial."""

    @section("record")
    def save(self, number: int, paused: TrainingCheckpoint) -> None:
        """Write a trial's state in place of an earlier one."""
        paused.save(self.path(number))

    @section("record")
    def load(self, number: int) -> TrainingCheckpoint | None:
        """Return a trial's state; None where it has none."""
        return TrainingCheckpoint.load(self.path(number))

    @property
    def numbers(self) -> set[int]:
        """The trials that have a state."""
        found = (path.stem.removeprefix("trial-") for path in self.folder.glob("trial-*.safetensors"))
        return {int(number) for number in found if number.isdecimal()}

    def drop(self, number: int) -> None:
        """Delete a trial's state, and what a killed process left of it unfinished."""
        for path in self.folder.glob(f"trial-{number:05d}.*"):
            path.unlink(missing_ok=True)


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
        generators=generator_states(devices_of(module)),
        early_stopping=early,
        callbacks=[_copies(callback.state_dict()) for callback in callbacks],
    )


def restore_state(
    state: TrainingState,
    trainer: Trainer,
    module: LightningModule,
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
    restore_generators(state.generators, devices_of(module))


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
