"""Hidden states below the lowest adapter, computed once a row and shared by all trials with that cut.

A trial is always served states that were computed in the same batches, whichever trial came first and whether
the file was there: a search that was killed and goes on gives the same results as one that was not.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autopeft.core.objectives import parse_quantity
from autopeft.evaluation.frozen_blocks.block_skipping import FrozenBlocks, Structure, UnservableError
from autopeft.evaluation.frozen_blocks.cost_model import Estimate, Passes, estimate, expected_trainings
from autopeft.evaluation.frozen_blocks.row_index import RowIndex, place
from autopeft.evaluation.frozen_blocks.store import HiddenStateFiles
from autopeft.methods import Attachment
from autopeft.models.backbone import Backbone
from autopeft.tasks.base import SplitName, TaskData
from autopeft.tasks.batch import rows_of
from autopeft.training.settings import Training

_logger = logging.getLogger(__name__)
_SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class HiddenStateUse:
    """Hidden states served in one training.

    Attributes:
        cut: Number of blocks below the cut.
        estimated_share: Share of the training's time that was expected to be saved.
        fill_seconds: Seconds spent on computing hidden states that were not there yet; on the CPU
            processor time.
    """

    cut: int
    estimated_share: float
    fill_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The hidden states at one cut: of each split, its rows and their states."""

    splits: Mapping[str, tuple[RowIndex, Tensor]]
    structure: Structure
    expected: Estimate
    fill_seconds: float


class HiddenStateCache:
    """Hidden states of one backbone on one task's training and validation split.

    Args:
        backbone: The resident backbone, with nothing attached.
        data: The task's splits.
        training: Says how the blocks below the cut are run, and how much may be kept.
        folder: Where files are kept; None to keep none.

    Attributes:
        uses: The trainings that were served, in their order.
        device: Where the model is.
    """

    def __init__(self, backbone: Backbone, data: TaskData, training: Training, folder: Path | None) -> None:
        self.uses: list[HiddenStateUse] = []
        self.device = training.resolved_device()
        self._backbone = backbone
        self._data = data
        self._training = training
        self._structure: Structure | None = None
        self._rows: dict[str, RowIndex] = {}
        self._token_bytes: dict[int, int] = {}
        self._unservable: set[int] = set()
        self._verified: set[str] = set()
        self._trainings = expected_trainings(None, len(backbone.blocks))
        self._files: HiddenStateFiles | None = None
        if training.frozen_blocks == "cached" and folder is not None:
            self._files = HiddenStateFiles(folder, int(parse_quantity(training.hidden_state_cache, "bytes")))
            # Before anything is attached: a fingerprint of the adapters too would fit nothing else.
            settings = backbone.model.config.to_json_string(use_diff=False)
            place_and_precision = f"{self.device.type} {training.resolved_precision()}"
            self._identity = f"{backbone.fingerprint} {settings} {place_and_precision}"

    def expect(self, trials: int | None) -> None:
        """Say how many trials the search's budget has: hidden states are kept where they pay for so many.

        Args:
            trials: None where the budget does not say.
        """
        self._trainings = expected_trainings(trials, len(self._backbone.blocks))

    def is_served(self, cut: int) -> bool:
        """Whether trainings with so many frozen blocks are served hidden states instead of running them."""
        if self._files is None or cut == 0 or cut in self._unservable or not self._know_rows():
            return False
        token_bytes = self._token_bytes.get(cut, self._assumed_token_bytes())
        return self._pays(self._estimate(cut, token_bytes), self._files)

    def describe(self) -> str | None:
        """Say where hidden states will be kept and how large they may become; None where none are kept."""
        if self._files is None or not self._know_rows():
            return None
        cuts = range(1, len(self._backbone.blocks) + 1)
        sizes = [
            self._estimate(cut, self._assumed_token_bytes()).bytes for cut in cuts if self.is_served(cut)
        ]
        if not sizes:
            return None
        largest = min(sum(sizes), self._files.limit_bytes)
        return (
            f"hidden states below the lowest adapter are kept in {self._files.folder}: "
            f"{max(sizes) / 2**30:.2g} GiB for each lowest block that trials use, "
            f"{largest / 2**30:.2g} GiB at most"
        )

    def _assumed_token_bytes(self) -> int:
        """Return the bytes of one token's hidden states, before any were computed."""
        width = max(shape.in_features for shape in self._backbone.sites.values() if shape.kind != "ffn")
        hidden = getattr(self._backbone.model.config, "hidden_size", None)
        is_single = self._training.resolved_precision() == "32-true"
        return (hidden if isinstance(hidden, int) else width) * (4 if is_single else 2)

    def _pays(self, expected: Estimate, files: HiddenStateFiles) -> bool:
        return expected.pays(self._trainings) and expected.bytes <= files.limit_bytes

    @contextmanager
    def below(self, attachment: Attachment) -> Iterator[TrialHiddenStates]:
        """Run what lies below an attached configuration as the training settings say, in a `with` block."""
        with ExitStack() as stack:
            frozen = None
            if self._training.frozen_blocks != "train" and attachment.cut is not None:
                frozen = FrozenBlocks(self._backbone.model, self._backbone.blocks, attachment.cut)
                stack.enter_context(frozen)
            trial = TrialHiddenStates(self, frozen)
            stack.callback(trial.close)
            yield trial

    def open(self, frozen: FrozenBlocks) -> _Opened | None:
        """Return the hidden states at a cut, computed where they are missing.

        None where serving them does not pay, or is not possible; the log says why.
        """
        cut = frozen.cut
        if self._files is None or cut == 0 or cut in self._unservable or not self._know_rows():
            return None
        try:
            self._backbone.model.eval()
            with torch.no_grad():
                return self._open(frozen, self._files)
        except UnservableError as error:
            self._unservable.add(cut)
            _logger.warning("Hidden states of %s cannot be served: %s.", self._backbone.name, error)
        except OSError as error:
            _logger.warning("Hidden states cannot be kept in %s: %s.", self._files.folder, error)
        return None

    def _know_rows(self) -> bool:
        for name in _SPLITS:
            if name not in self._rows:
                collator = self._data.collator(name)
                if collator is None:
                    return False
                self._rows[name] = RowIndex(collator, self._training.batch_size)
        return True

    def _open(self, frozen: FrozenBlocks, files: HiddenStateFiles) -> _Opened | None:
        structure = self._check_architecture(frozen)
        token_bytes = self._token_bytes[frozen.cut]
        expected = self._estimate(frozen.cut, token_bytes)
        if not self._pays(expected, files):
            pays = expected.pays(self._trainings)
            why = f"{expected.bytes:,} bytes are too many" if pays else "it would not pay"
            _logger.info("Hidden states below block %d are not kept: %s.", frozen.cut, why)
            return None
        keys = {name: self._key(name, frozen.cut) for name in _SPLITS}
        opened: dict[str, tuple[RowIndex, Tensor]] = {}
        fill_seconds = 0.0
        for name, key in keys.items():
            rows = self._rows[name]
            states = files.open(key)
            if states is None or not self._agrees(frozen, structure, rows, states, key):
                size = (rows.tokens + 1) * token_bytes
                if not files.make_room(size, frozenset(keys.values())):
                    raise OSError(f"there is no room for {size:,} bytes")
                started = self._clock()
                states = self._filled(frozen, structure, name, files)
                fill_seconds += self._clock() - started
            opened[name] = rows, states
        return _Opened(splits=opened, structure=structure, expected=expected, fill_seconds=fill_seconds)

    def _filled(
        self, frozen: FrozenBlocks, structure: Structure, name: str, files: HiddenStateFiles
    ) -> Tensor:
        """Compute a split's hidden states in one pass, from the highest lower cut whose states are there."""
        rows, key = self._rows[name], self._key(name, frozen.cut)
        start, stored = self._start(name, frozen.cut, files)
        self._verified.discard(key)
        with (
            files.writing(key, rows.tokens + 1) as writer,
            self._mixed(),
            FrozenBlocks(frozen.model, frozen.blocks, start) as below,
        ):
            for batch in rows.batches:
                inputs = rows.inputs(batch, self.device)
                serving: AbstractContextManager[None] = nullcontext()
                if stored is not None:
                    serving = below.serving(rows.gather(stored, batch, self.device), structure)
                with serving:
                    writer.write(frozen.states(inputs)[rows.inside(batch).to(self.device)])
            writer.write_padding()
        states = files.open(key)
        if states is None:
            raise OSError("a file that was just written is gone")
        if not self._agrees(frozen, structure, rows, states, key):
            raise UnservableError("with them in place the model computes something else")
        return states

    def _start(self, name: str, cut: int, files: HiddenStateFiles) -> tuple[int, Tensor | None]:
        """Return the highest lower cut whose hidden states are there, and these; 0 where none are."""
        for lower_cut in range(cut - 1, 0, -1):
            states = files.open(self._key(name, lower_cut))
            if states is not None:
                return lower_cut, states
        return 0, None

    def _clock(self) -> float:
        # On the CPU processor time: another process must not look like a cost.
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def _key(self, name: str, cut: int) -> str:
        text = f"{self._identity} {self._rows[name].identity} {cut}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _estimate(self, cut: int, token_bytes: int) -> Estimate:
        backbone, steps = self._backbone, self._data.steps_per_epoch
        epochs = self._training.total_steps(steps) / steps
        times = {"train": epochs, "validation": max(1.0, epochs / self._training.validate_every)}
        linear = [shape.parameters for shape in backbone.sites.values() if shape.kind == "linear"]
        return estimate(
            {
                name: Passes(
                    batches=len(rows.batches),
                    tokens=rows.tokens,
                    times=times[name],
                    block_cost=2 if name == "train" else 1,
                )
                for name, rows in self._rows.items()
            },
            cut=cut,
            blocks=len(backbone.blocks),
            block_parameters=sum(linear) / len(backbone.blocks),
            token_bytes=token_bytes,
            device=self.device.type,
        )

    def _check_architecture(self, frozen: FrozenBlocks) -> Structure:
        """Try serving on a few rows whose hidden states were computed alone, without padding.

        Raises:
            UnservableError: The model computes something else, for example as its positions count padding.
        """
        rows = self._rows["train"]
        probe = rows.probe()
        inputs = rows.inputs(probe, self.device)
        if self._structure is None:
            self._structure = Structure(self._backbone.model, self._backbone.blocks, inputs)
        if frozen.cut in self._token_bytes:
            return self._structure
        obstacle = self._structure.obstacle(frozen.cut)
        if obstacle is not None:
            raise UnservableError(obstacle)
        alone = [frozen.states(rows.inputs([row], self.device))[0] for row in probe]
        table = torch.cat([*alone, torch.zeros_like(alone[0][:1])]).cpu()
        starts = np.cumsum([0, *(len(states) for states in alone[:-1])])
        states = place(table, rows.collator.positions(probe), starts, self.device)
        error = self._error(frozen, self._structure, inputs, states, rows.inside(probe))
        if not error <= _tolerance(table, "32-true"):
            raise UnservableError(
                f"a row's depend on the padding of its batch (the difference is {error:.2g} of them)"
            )
        self._token_bytes[frozen.cut] = table.shape[1] * table.element_size()
        return self._structure

    def _agrees(
        self, frozen: FrozenBlocks, structure: Structure, rows: RowIndex, stored: Tensor, key: str
    ) -> bool:
        """Whether a file holds this model's hidden states, by a few rows; asked once a process."""
        if key not in self._verified:
            if len(stored) != rows.tokens + 1:
                return False
            probe = rows.probe()
            with self._mixed():
                states = rows.gather(stored, probe, self.device)
                inputs = rows.inputs(probe, self.device)
                error = self._error(frozen, structure, inputs, states, rows.inside(probe))
            if not error <= _tolerance(states, self._training.resolved_precision()):
                return False
            self._verified.add(key)
        return True

    def _error(
        self,
        frozen: FrozenBlocks,
        structure: Structure,
        inputs: Mapping[str, Tensor],
        states: Tensor,
        inside: Tensor,
    ) -> float:
        """Return how far serving is off: the largest relative difference of a token's states or of logits."""
        model = self._backbone.model
        seen: list[Tensor] = []
        with frozen.looking(seen.append):
            plain = model(**inputs).logits.float()
        with frozen.serving(states, structure):
            served = model(**inputs).logits.float()
        given, expected = (found[inside.to(found.device)].float() for found in (states, seen[0]))
        of_states = (given - expected).norm(dim=-1) / expected.norm(dim=-1)
        of_logits = (served - plain).abs().max() / plain.abs().max()
        return float(torch.maximum(of_states.max(), of_logits))

    def _mixed(self) -> AbstractContextManager[None]:
        """Compute in the training's precision."""
        return self._backbone.computing_in(self._training.resolved_precision())


class TrialHiddenStates:
    """The hidden states below one trial's lowest adapter.

    Args:
        cache: Has the hidden states.
        frozen: The frozen blocks, entered; None where none are held apart.
    """

    def __init__(self, cache: HiddenStateCache, frozen: FrozenBlocks | None) -> None:
        self._cache = cache
        self._frozen = frozen
        self._opened: _Opened | None = None

    def open(self) -> None:
        """Get the hidden states that training and validation will be served, if that pays."""
        if self._frozen is None:
            return
        self._opened = self._cache.open(self._frozen)
        if self._opened is not None:
            use = HiddenStateUse(
                cut=self._frozen.cut,
                estimated_share=self._opened.expected.share,
                fill_seconds=self._opened.fill_seconds,
            )
            self._cache.uses.append(use)

    def close(self) -> None:
        """Let go of the files: what a trainer refers to lives on until Python looks for cycles."""
        self._opened = None

    @contextmanager
    def serve(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Leave the frozen blocks out of forward passes over a batch, if its hidden states are at hand."""
        found = rows_of(batch)
        if self._opened is None or self._frozen is None or found is None:
            yield
            return
        split, numbers = found
        rows, stored = self._opened.splits[split]
        states = rows.gather(stored, numbers.tolist(), self._cache.device)
        with self._frozen.serving(states, self._opened.structure):
            yield


def _tolerance(states: Tensor, precision: str) -> float:
    """Return the largest relative difference that is rounding."""
    return 1e-3 if states.dtype == torch.float32 and precision == "32-true" else 0.1
