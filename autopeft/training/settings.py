"""What every candidate of a search has in common in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from autopeft.core.errors import check_choice, check_whole
from autopeft.core.objectives import parse_quantity
from autopeft.core.precision import Precision, quickest_precision
from autopeft.training.trial_callbacks import CallbackSource, check_sources, describe_callback, new_callbacks

FrozenBlocksMode = Literal["train", "eval", "cached"]
Device = Literal["auto", "cpu", "cuda"]
TrainingPrecision = Literal["auto", "32-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every candidate of a search has in common; what differs stands in its configuration.

    Attributes:
        epochs: Passes over the training split.
        max_steps: Stop after this many optimizer steps at the latest; None for no bound.
        batch_size: Examples a step.
        accumulate: Parts that a batch runs through the model in, one after another. Results are those of
            whole batches but for rounding and dropout; activations take memory for one part at a time. With
            data loaders of a task's own, as many of their batches make a step.
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
        hidden_state_cache: Bytes that kept hidden states may take on disk, as in "8 GiB".
        gradient_checkpointing: Whether activations are computed again in the backward pass, which takes about
            a third more time and far less memory.
        callbacks: Lightning callbacks for every trial, such as `autopeft.callbacks.IST()`: instances, of
            which each trial gets a copy, or functions that make one. Over a pause at a rung a callback
            keeps what its `state_dict` returns. A callback with a method `applies_to(module)` is left out of
            trials for which that is false: those for ranks, of trials without LoRA.

    Raises:
        ValueError: A value is out of its range.
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    warmup_share: float = 0.06
    gradient_clip: float | None = 1.0
    patience: int | None = None
    validate_every: int = 1
    device: Device = "auto"
    precision: TrainingPrecision = "auto"
    frozen_blocks: FrozenBlocksMode = "cached"
    hidden_state_cache: int | str = field(default="8 GiB", compare=False)
    gradient_checkpointing: bool = False
    callbacks: Sequence[CallbackSource] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "validate_every"):
            check_whole(name, getattr(self, name), least=1)
        for name in ("max_steps", "patience"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=1)
        if self.batch_size % self.accumulate:
            fitting = [parts for parts in range(1, self.batch_size + 1) if self.batch_size % parts == 0]
            nearest = min(fitting, key=lambda parts: abs(parts - self.accumulate))
            raise ValueError(
                f"accumulate={self.accumulate} does not cut batch_size={self.batch_size} into equal parts: "
                f"the nearest number that does is {nearest}."
            )
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share is a share in [0, 1], got {self.warmup_share!r}.")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip is above 0 or None, got {self.gradient_clip!r}.")
        if self.validate_every > self.epochs:
            raise ValueError(
                f"validate_every={self.validate_every} is beyond the {self.epochs} epochs: "
                "a candidate would never be validated."
            )
        choices_of = {"device": Device, "precision": TrainingPrecision, "frozen_blocks": FrozenBlocksMode}
        for name, choices in choices_of.items():
            check_choice(name, get_args(choices), getattr(self, name))
        parse_quantity(self.hidden_state_cache, "bytes")
        object.__setattr__(self, "callbacks", check_sources(self.callbacks))
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

    @property
    def part_size(self) -> int:
        """Examples that run through the model at once."""
        return self.batch_size // self.accumulate

    def steps_per_epoch(self, batches: int) -> int:
        """Return the number of optimizer steps in which so many batches of `part_size` are trained on."""
        return -(-batches // self.accumulate)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of a training that is not stopped early."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def identity(self) -> dict[str, str]:
        """Return every setting that results depend on, as text."""
        apart = ("callbacks", "gradient_checkpointing", "accumulate")  # named where they are set
        names = [each.name for each in dataclasses.fields(self) if each.compare and each.name not in apart]
        identity = {"class": type(self).__name__, **{name: str(getattr(self, name)) for name in names}}
        if self.gradient_checkpointing:
            identity["gradient_checkpointing"] = "True"
        if self.accumulate > 1:
            identity["accumulate"] = str(self.accumulate)
        if self.callbacks:
            identity["callbacks"] = ", ".join(map(describe_callback, new_callbacks(self.callbacks)))
        return identity
