"""Hidden states below the lowest adapter, computed once a row and shared by all trials with that cut.

A trial is always served states that were computed in the same batches, whichever trial came first and whether
the file was there: a search that was killed and goes on gives the same results as one that was not.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from autopeft.core.objectives import parse_quantity
from autopeft.evaluation.frozen_blocks.block_skipping import (
    Structure,
    UnservableError,
    evaluation_mode_below,
    servable_blocks,
    states_at,
)
from autopeft.evaluation.frozen_blocks.cost_model import Estimate, Passes, estimate, expected_trainings
from autopeft.evaluation.frozen_blocks.store import HiddenStateFiles
from autopeft.methods import Attachment
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import quantization_of
from autopeft.tasks.base import RowCollator, SplitName, Task, TaskData
from autopeft.tasks.batch import rows_of
from autopeft.tasks.length_bucketing import sorted_batches
from autopeft.training.compute_meter import ComputeMeter
from autopeft.training.settings import Training

_logger = logging.getLogger(__name__)
_SPLITS: tuple[SplitName, ...] = ("train", "validation")
_PROBE_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class HiddenStateUse:
    """Hidden states served in one training."""

    cut: int
    estimated_share: float  # of the training's time that was expected to be saved
    fill_seconds: float  # spent on computing those that were not there; on the CPU processor time


class RowIndex:
    """A split's rows, in the batches in whose order hidden states are computed and, unpadded, stored."""

    def __init__(self, collator: RowCollator, lengths: NDArray[np.int64], batch_size: int) -> None:
        self._collator = collator
        self._lengths = lengths
        self._side: Literal["left", "right"] = "left" if collator.left else "right"
        self.batches = sorted_batches(self._lengths, batch_size)
        self.tokens = int(self._lengths.sum())
        self.identity = f"{collator.fingerprint} {self._side} {batch_size}"
        order = np.concatenate(self.batches)
        self._starts = np.empty(len(order), dtype=np.int64)
        self._starts[order] = np.cumsum(self._lengths[order]) - self._lengths[order]

    def inputs(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Return a batch of these rows."""
        return {name: tensor.to(device) for name, tensor in self._collator(rows).items()}

    def inside(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return where a batch of these rows has tokens, of shape (rows, longest)."""
        return self.padded([torch.ones(self._lengths[row], dtype=torch.bool, device=device) for row in rows])

    def gather(self, states: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the hidden states of a batch, of shape (rows, longest, width), out of a file's."""
        return self.padded([states[self._starts[row] :][: self._lengths[row]] for row in rows])

    def padded(self, states: list[Tensor]) -> Tensor:
        """Return the hidden states of rows, each of shape (tokens, width), as one batch, zeros at padding."""
        return pad_sequence(states, batch_first=True, padding_side=self._side)

    def probe(self) -> list[int]:
        """Return a few rows, from the shortest to the longest."""
        order = np.argsort(self._lengths, kind="stable")
        ranks = np.linspace(0, len(order) - 1, min(_PROBE_ROWS, len(order))).astype(int)
        return [int(row) for row in order[ranks]]


@dataclass(eq=False)
class HiddenStateCache:
    """Hidden states of one backbone on one task's training and validation split."""

    backbone: Backbone  # the resident backbone, with nothing attached
    task: Task  # says what the model predicts
    data: TaskData  # the task's splits
    training: Training  # says how the blocks below the cut are run, and how much may be kept
    folder: Path | None  # where files are kept; None to keep none
    uses: list[HiddenStateUse] = field(default_factory=list)  # the trainings that were served, in their order

    def __post_init__(self) -> None:
        self._device = self.training.resolved_device()
        self._precision = self.training.resolved_precision()
        self._token_bytes: dict[int, int] = {}
        self._unservable: set[int] = set()
        self._verified: set[str] = set()
        self.expect(None)
        self._cut = 0  # of what is attached, or where a first stack ends before it
        self._servable = servable_blocks(self.backbone)
        self._served: dict[str, tuple[RowIndex, Tensor]] = {}
        self._files: HiddenStateFiles | None = None
        if self.training.frozen_blocks == "cached" and self.folder is not None:
            limit = int(parse_quantity(self.training.hidden_state_cache, "bytes"))
            if (quantization_of(self.backbone.model) or {}).get("load_in_8bit"):
                _logger.info(
                    "No hidden states are kept of an 8-bit backbone: they depend on the whole batch."
                )
                return
            self._files = HiddenStateFiles(self.folder, limit)
            # Before anything is attached: a fingerprint of the adapters too would fit nothing else.
            settings = self.backbone.model.config.to_json_string(use_diff=False)
            self._identity = f"{self.backbone.fingerprint} {settings} {self._device.type} {self._precision}"

    def expect(self, trials: int | None) -> None:
        """Say how many trials the budget has, or None: hidden states are kept where they pay for so many."""
        self.trials = trials
        self._trainings = expected_trainings(trials, len(self.backbone.blocks))

    def is_served(self, cut: int) -> bool:
        """Whether trainings with so many frozen blocks are served hidden states instead of running them."""
        cut = min(cut, self._servable)
        return self._may_serve(cut) and self._pays(self._estimate(cut))

    def describe(self) -> str | None:
        """Say where hidden states will be kept and how large they may become; None where none are kept."""
        cuts = range(1, self._servable + 1)
        sizes = [self._estimate(cut).bytes for cut in cuts if self.is_served(cut)]
        if self._files is None or not sizes:
            return None
        largest = min(sum(sizes), self._files.limit_bytes)
        return (
            f"hidden states below the lowest adapter are kept in {self._files.folder}: "
            f"{max(sizes) / 2**30:.2g} GiB for each lowest block that trials use, "
            f"{largest / 2**30:.2g} GiB at most"
        )

    @contextmanager
    def below(self, attachment: Attachment, frozen: int | None = None) -> Iterator[None]:
        """Run what lies below an attached configuration as the training settings say, in a `with` block.

        With `frozen`, only so many blocks are: those whose hidden states another configuration has used.
        """
        with ExitStack() as stack:
            cut = attachment.cut if frozen is None else frozen
            if self.training.frozen_blocks != "train" and cut is not None:
                self._cut = min(cut, self._servable)
                stack.enter_context(evaluation_mode_below(cut, self.backbone))
            try:
                yield
            finally:
                self._cut, self._served = 0, {}

    def open(self) -> None:
        """Get the hidden states below what is attached; where that does not pay, none: the log says why."""
        cut, files = self._cut, self._files
        if files is None or not self._may_serve(cut):
            return
        try:
            self.backbone.model.eval()
            with torch.no_grad():
                self._open(cut, files)
        except UnservableError as error:
            self._unservable.add(cut)
            _logger.warning("Hidden states of %s cannot be served: %s.", self.backbone.name, error)
        except OSError as error:
            _logger.warning("Hidden states cannot be kept in %s: %s.", files.folder, error)

    def serve(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Leave the frozen blocks out of forward passes over a batch, if its hidden states were opened."""
        split, numbers = rows_of(batch) or ("", None)
        if numbers is None or split not in self._served:
            return nullcontext()
        rows, stored = self._served[split]
        states = rows.gather(stored, numbers.tolist()).to(self._device)
        return self._structure.serving(self._cut, states)

    @cached_property
    def _rows(self) -> dict[SplitName, RowIndex]:
        """The rows of both splits; none where a task does not say which rows a batch holds."""
        collators = {name: self.data.collator(name) for name in _SPLITS}
        batch_size = self.training.part_size
        rows = {
            name: RowIndex(own, self._lengths(own), batch_size)
            for name, own in collators.items()
            if own is not None
        }
        if len(rows) == len(_SPLITS):
            return rows
        _logger.info(
            "No hidden states are kept: %s does not give a row the same states each time.", self.task.name
        )
        return {}

    def _lengths(self, collator: RowCollator) -> NDArray[np.int64]:
        """Return how many tokens the model makes of each row."""
        if collator.lengths is not None:
            return collator.lengths
        model = self.backbone.model.eval()
        inputs = {name: tensor.to(model.device) for name, tensor in collator([0]).items()}
        with torch.no_grad(), self.backbone.computing_in(self.backbone.own_precision):
            states = states_at([1], self.backbone, self.task, inputs)[1]
        return np.full(len(collator), states.shape[1])

    @cached_property
    def _structure(self) -> Structure:
        rows = self._rows["train"]
        with self.backbone.computing_in(self.backbone.own_precision):
            return Structure(self.backbone, self.task, rows.inputs(rows.probe(), self._device))

    def _may_serve(self, cut: int) -> bool:
        return self._files is not None and cut > 0 and cut not in self._unservable and bool(self._rows)

    def _pays(self, expected: Estimate) -> bool:
        fits = self._files is not None and expected.bytes <= self._files.limit_bytes
        return fits and expected.pays(self._trainings)

    def _estimate(self, cut: int) -> Estimate:
        backbone = self.backbone
        steps = self.training.steps_per_epoch(self.data.batches_per_epoch)
        epochs = self.training.total_steps(steps) / steps
        times = {"train": epochs, "validation": max(1.0, epochs / self.training.validate_every)}
        linear = [shape.parameters for shape in backbone.sites.values() if shape.kind == "linear"]
        costs = {"train": 2, "validation": 1}
        return estimate(
            [
                Passes(batches=len(own.batches), tokens=own.tokens, times=times[name], block_cost=costs[name])
                for name, own in self._rows.items()
            ],
            cut=cut,
            blocks=len(backbone.blocks),
            block_parameters=sum(linear) / len(backbone.blocks),
            token_bytes=self._token_bytes.get(cut) or self._assumed_token_bytes(),
            device=self._device.type,
        )

    def _assumed_token_bytes(self) -> int:
        """Return the bytes of one token's hidden states, before any were computed."""
        width = max(shape.in_features for shape in self.backbone.sites.values() if shape.kind != "ffn")
        hidden = getattr(self.backbone.model.config, "hidden_size", None)
        is_single = self._precision == "32-true"
        return (hidden if isinstance(hidden, int) else width) * (4 if is_single else 2)

    def _open(self, cut: int, files: HiddenStateFiles) -> None:
        self._check_architecture(cut)
        expected = self._estimate(cut)
        if not self._pays(expected):
            pays = expected.pays(self._trainings)
            why = f"{expected.bytes:,} bytes are too many" if pays else "it would not pay"
            _logger.info("Hidden states below block %d are not kept: %s.", cut, why)
            return
        keys = {name: self._key(name, cut) for name in _SPLITS}
        opened: dict[str, tuple[RowIndex, Tensor]] = {}
        fill_seconds = 0.0
        for name, key in keys.items():
            rows = self._rows[name]
            states = files.open(key)
            if states is None or not self._agrees(cut, rows, states, key):
                size = rows.tokens * self._token_bytes[cut]
                if not files.make_room(size, keys.values()):
                    raise OSError(f"there is no room for {size:,} bytes")
                meter = ComputeMeter(self._device)
                states = self._filled(cut, rows, key, files)
                cost = meter.read()
                fill_seconds += cost.gpu_seconds or cost.cpu_seconds
            opened[name] = rows, states
        self._served = opened
        self.uses.append(HiddenStateUse(cut=cut, estimated_share=expected.share, fill_seconds=fill_seconds))

    def _filled(self, cut: int, rows: RowIndex, key: str, files: HiddenStateFiles) -> Tensor:
        """Compute a split's hidden states in one pass, and return them from their file."""
        with self.backbone.computing_in(self._precision):
            files.write(key, (self._states(cut, rows, batch) for batch in rows.batches))
        states = files.open(key)
        if states is None:
            raise OSError("a file that was just written is gone")
        if not self._agrees(cut, rows, states, key):
            raise UnservableError("with them in place the model computes something else")
        return states

    def _key(self, name: SplitName, cut: int) -> str:
        text = f"{self._identity} {self._rows[name].identity} {cut}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _states(self, cut: int, rows: RowIndex, batch: Sequence[int]) -> Tensor:
        """Return the hidden states at a batch's tokens, of shape (tokens, width)."""
        inputs = rows.inputs(batch, self._device)
        states = states_at([cut], self.backbone, self.task, inputs)[cut].to(self._device)
        return states[rows.inside(batch, self._device)]

    def _check_architecture(self, cut: int) -> None:
        """Try serving a few rows' hidden states that were computed alone: positions may count padding."""
        if cut in self._token_bytes:
            return
        if (obstacle := self._structure.obstacle(cut)) is not None:
            raise UnservableError(obstacle)
        rows = self._rows["train"]
        precision = self.backbone.own_precision  # under autocast, rounding would hide what depends on padding
        with self.backbone.computing_in(precision):
            states = rows.padded([self._states(cut, rows, [row]) for row in rows.probe()])
            error = self._error(cut, rows, states)
        if not error <= self._tolerance(states, precision):
            raise UnservableError(
                f"those of a row depend on the padding of its batch (by {error:.2g} of their size)"
            )
        self._token_bytes[cut] = states.shape[-1] * states.element_size()

    def _agrees(self, cut: int, rows: RowIndex, stored: Tensor, key: str) -> bool:
        """Whether a file holds this model's hidden states, by a few rows; asked once a process."""
        if key not in self._verified and len(stored) == rows.tokens:
            states = rows.gather(stored, rows.probe()).to(self._device)
            with self.backbone.computing_in(self._precision):
                error = self._error(cut, rows, states)
            if error <= self._tolerance(states, self._precision):
                self._verified.add(key)
        return key in self._verified

    def _error(self, cut: int, rows: RowIndex, states: Tensor) -> float:
        """Return how far serving the probe's states is off, relative to what is computed.

        The largest difference of a token's states or of what is predicted.
        """
        model, probe = self.backbone.model, rows.probe()
        inputs, inside = rows.inputs(probe, self._device), rows.inside(probe, self._device)
        given = states[inside].float()
        expected = self._states(cut, rows, probe).float()
        plain = self.task.predicted(self.task.forward(model, inputs)).float()
        with self._structure.serving(cut, states):
            served = self.task.predicted(self.task.forward(model, inputs)).float()
        of_states = (given - expected).norm(dim=-1) / expected.norm(dim=-1)
        if served.shape[:2] == inside.shape:
            served, plain = served[inside], plain[inside]  # what is predicted at padding counts for nothing
        of_prediction = (served - plain).abs().max() / plain.abs().max()
        return float(torch.maximum(of_states.max(), of_prediction))

    def _tolerance(self, states: Tensor, precision: str) -> float:
        """Return the largest relative difference that is rounding."""
        is_single = states.dtype == torch.float32 and precision == "32-true" and not self.backbone.quantized
        return 1e-3 if is_single else 0.1
