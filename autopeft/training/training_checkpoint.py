"""A training that pauses at a rung: everything it needs to go on as if it had not been interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autopeft.core.evaluation import Evaluation
from autopeft.core.profiling import section

_META = "autopeft"


_GROUPS = ("weights", "best_weights", "optimizer", "generators")


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
        generators: States of the random generators, by device type.
        early_stopping: State of the early-stopping callback; empty without one.
    """

    step: int
    weights: Mapping[str, Tensor]
    best_weights: Mapping[str, Tensor]
    best: float
    best_metrics: Mapping[str, float]
    optimizer: Mapping[str, Tensor]
    generators: Mapping[str, Tensor]
    early_stopping: Mapping[str, Any]


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
        """Write it as safetensors; the file is there whole or not at all."""
        tensors: dict[str, Tensor] = {
            f"{group}/{name}": tensor.contiguous()
            for group in _GROUPS
            for name, tensor in getattr(self.state, group).items()
        }
        rest = {
            "evaluation": self.evaluation.to_dict(),
            "state": {
                "step": self.state.step,
                "best": self.state.best,
                "best_metrics": dict(self.state.best_metrics),
                "early_stopping": dict(self.state.early_stopping),
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file(tensors, unfinished, metadata={_META: json.dumps(rest)})
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> TrainingCheckpoint | None:
        """Read what `save` wrote; None where there is no such file."""
        if not path.is_file():
            return None
        groups: dict[str, Any] = {group: {} for group in _GROUPS}
        with safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()[_META])
            for key in file.keys():  # noqa: SIM118 - the handle is no mapping
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
        state = TrainingState(**rest["state"], **groups)
        return cls(evaluation=Evaluation.from_dict(rest["evaluation"]), state=state)


class TrainingCheckpoints:
    """One file a paused trial in a folder.

    Args:
        folder: Made when the first trial pauses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, number: int) -> Path:
        return self.folder / f"trial-{number:05d}.safetensors"

    @section("record")
    def save(self, number: int, paused: TrainingCheckpoint) -> None:
        """Write a trial's state in place of an earlier one."""
        paused.save(self._path(number))

    @section("record")
    def load(self, number: int) -> TrainingCheckpoint | None:
        """Return a trial's state; None where it has none."""
        return TrainingCheckpoint.load(self._path(number))

    def drop(self, number: int) -> None:
        """Delete a trial's state."""
        self._path(number).unlink(missing_ok=True)
