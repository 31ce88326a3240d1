"""Hidden states below the lowest adapter, computed once a row and shared by all trials with that cut.

Whatever a trial is served was computed in the same batches, whichever trial came first and whether the file
was there: a search that was killed and goes on gives the same results as one that was not.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autopeft.core.objectives import parse_quantity
from autopeft.evaluation.frozen_blocks.block_skipping import FrozenBlocks, Structure, UnservableError
from autopeft.evaluation.frozen_blocks.cost_model import Estimate, Passes, estimate
from autopeft.evaluation.frozen_blocks.fill import SECONDS_PER_TOKEN, SECONDS_SAVED, Start, fill
from autopeft.evaluation.frozen_blocks.row_index import RowIndex, place
from autopeft.evaluation.frozen_blocks.store import HiddenStateFiles, StoredStates
from autopeft.methods import Attachment
from autopeft.models.backbone import Backbone
from autopeft.models.module_modes import in_mode
from autopeft.tasks.base import SplitName, TaskData
from autopeft.tasks.batch import rows_of
from autopeft.training.settings import Training

_logger = logging.getLogger(__name__)
_SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclass(frozen=True, kw_only=True)
class HiddenStateUse:
    """What serving hidden states gave in one training; times are processor time on the CPU.

    Attributes:
        cut: Number of blocks below the cut.
        estimated_share: Share of the training's time that was expected to be saved.
        share: The share that was saved, of the time without serving, validations included.
        seconds_saved: Time that the blocks below the cut would have taken, at the speed they had when the
            states were computed, less what serving took.
        fill_seconds: Time spent on computing hidden states that were not there yet, those of lower cuts among
            them; not part of the above.
    """

    cut: int
    estimated_share: float
    share: float
    seconds_saved: float
    fill_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """The hidden states at one cut: of each split, its rows and their states."""

    splits: Mapping[str, tuple[RowIndex, StoredStates]]
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
        uses: What serving gave, a training each.
        device: Where the model is.
        clock: What time is measured with.
    """

    def __init__(self, backbone: Backbone, data: TaskData, training: Training, folder: Path | None) -> None:
        self.uses: list[HiddenStateUse] = []
        self.device = training.resolved_device()
        # On the CPU processor time: another process must not look like a gain or a loss.
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self._backbone = backbone
        self._data = data
        self._training = training
        self._structure: Structure | None = None
        self._rows: dict[str, RowIndex] = {}
        self._token_bytes: dict[int, int] = {}
        self._unservable: set[int] = set()
        self._verified: set[str] = set()
        self._files: HiddenStateFiles | None = None
        if training.frozen_blocks == "cached" and folder is not None:
            self._files = HiddenStateFiles(folder, int(parse_quantity(training.prefix_cache, "bytes")))
            # Before anything is attached: a fingerprint of the adapters too would fit nothing else.
            settings = backbone.model.config.to_json_string(use_diff=False)
            place_and_precision = f"{self.device.type} {training.resolved_precision()}"
            self._identity = f"{backbone.fingerprint} {settings} {place_and_precision}"

    @contextmanager
    def below(self, attachment: Attachment) -> Iterator[TrialHiddenStates]:
        """Run what lies below an attached configuration as the training settings say, in a `with` block."""
        with ExitStack() as stack:
            prefix = None
            if self._training.frozen_blocks != "train" and attachment.cut is not None:
                prefix = FrozenBlocks(self._backbone.model, self._backbone.blocks, attachment.cut)
                stack.enter_context(prefix)
            trial = TrialHiddenStates(self, prefix)
            stack.callback(trial.close)
            yield trial

    def open(self, prefix: FrozenBlocks) -> _Opened | None:
        """Return the hidden states at a cut, computed where they are missing.

        None where serving them does not pay, or is not possible; the log says why.
        """
        cut = prefix.cut
        if self._files is None or cut == 0 or cut in self._unservable or not self._know_rows():
            return None
        try:
            with in_mode(self._backbone.model, training=False), torch.no_grad():
                return self._open(prefix, self._files)
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

    def _open(self, prefix: FrozenBlocks, files: HiddenStateFiles) -> _Opened | None:
        structure = self._check_architecture(prefix)
        token_bytes = self._token_bytes[prefix.cut]
        expected = self._estimate(prefix.cut, token_bytes)
        if not expected.pays or expected.bytes > files.limit_bytes:
            why = f"{expected.bytes:,} bytes are too many" if expected.pays else "it would not pay"
            _logger.info("Hidden states below block %d are not kept: %s.", prefix.cut, why)
            return None
        keys = {name: self._key(name, prefix.cut) for name in _SPLITS}
        opened: dict[str, tuple[RowIndex, StoredStates]] = {}
        started, filled = self.clock(), False
        for name, key in keys.items():
            rows = self._rows[name]
            states = files.open(key)
            if states is None or not self._agrees(prefix, structure, rows, states, key):
                filled = True
                size = (rows.tokens + 1) * token_bytes
                if not files.make_room(size, frozenset(keys.values())):
                    raise OSError(f"there is no room for {size:,} bytes")
                states = self._filled(prefix, structure, name, files)
            opened[name] = rows, states
        seconds = self.clock() - started if filled else 0.0
        return _Opened(splits=opened, structure=structure, expected=expected, fill_seconds=seconds)

    def _filled(
        self, prefix: FrozenBlocks, structure: Structure, name: str, files: HiddenStateFiles
    ) -> StoredStates:
        start = self._start(name, prefix.cut, files)
        on_the_way = self._on_the_way(start.cut, prefix.cut, files)
        key = self._key(name, prefix.cut)
        try:
            self._fill(prefix, structure, name, files, start, (*on_the_way, prefix.cut))
        except OSError as error:
            if not on_the_way:
                raise
            # What nobody has asked for yet must not cost the trial its own.
            _logger.info("Hidden states of lower cuts cannot be kept: %s.", error)
            if files.open(key) is None:
                self._fill(prefix, structure, name, files, start, (prefix.cut,))
        states = files.open(key)
        if states is None:
            raise OSError("a file that was just written is gone")
        if not self._agrees(prefix, structure, self._rows[name], states, key):
            raise UnservableError("with them in place the model computes something else")
        return states

    def _fill(
        self,
        prefix: FrozenBlocks,
        structure: Structure,
        name: str,
        files: HiddenStateFiles,
        start: Start,
        cuts: Sequence[int],
    ) -> None:
        rows, writers = self._rows[name], {}
        with ExitStack() as stack:
            for cut in cuts:
                key = self._key(name, cut)
                self._verified.discard(key)
                writers[cut] = stack.enter_context(files.writing(key, rows.tokens + 1))
            stack.enter_context(self._mixed())
            fill(prefix, structure, rows, writers, start, device=self.device, clock=self.clock)

    def _start(self, name: str, cut: int, files: HiddenStateFiles) -> Start:
        """Return the highest lower cut whose hidden states there are."""
        for lower_cut in range(cut - 1, 0, -1):
            states = files.open(self._key(name, lower_cut))
            if states is not None:
                return Start(lower_cut, states)
        return Start(0, None)

    def _on_the_way(self, start: int, cut: int, files: HiddenStateFiles) -> list[int]:
        """Return the cuts between whose hidden states a pass is to keep too: other trials will have them.

        Nothing is removed for them, and room is left for the cut itself.
        """
        kept: list[int] = []
        for lower_cut in range(cut - 1, start, -1):
            expected = self._estimate(lower_cut, self._token_bytes[cut])
            files_then = len(kept) + 2  # with this one, and that of the cut itself
            pays = expected.pays and expected.pays_on_the_way
            if pays and files.has_room(files_then * expected.bytes):
                kept.append(lower_cut)
        return kept

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

    def _check_architecture(self, prefix: FrozenBlocks) -> Structure:
        """Try serving on a few rows whose hidden states were computed alone, without padding.

        Raises:
            UnservableError: The model computes something else, for example as its positions count padding.
        """
        rows = self._rows["train"]
        probe = rows.probe()
        inputs = rows.inputs(probe, self.device)
        if self._structure is None:
            self._structure = Structure(self._backbone.model, self._backbone.blocks, inputs)
        if prefix.cut in self._token_bytes:
            return self._structure
        obstacle = self._structure.obstacle(prefix.cut)
        if obstacle is not None:
            raise UnservableError(obstacle)
        alone = [prefix.states(rows.inputs([row], self.device))[0] for row in probe]
        table = torch.cat([*alone, torch.zeros_like(alone[0][:1])]).cpu()
        starts = np.cumsum([0, *(len(one) for one in alone[:-1])])
        states = place(table, rows.collator.positions(probe), starts, self.device)
        error = self._error(prefix, self._structure, inputs, states, rows.inside(probe))
        if not error <= _tolerance(table, "32-true"):
            raise UnservableError(
                f"a row's depend on the padding of its batch (the difference is {error:.2g} of them)"
            )
        self._token_bytes[prefix.cut] = table.shape[1] * table.element_size()
        return self._structure

    def _agrees(
        self, prefix: FrozenBlocks, structure: Structure, rows: RowIndex, stored: StoredStates, key: str
    ) -> bool:
        """Whether a file holds this model's hidden states, by a few rows; asked once a process."""
        if key not in self._verified:
            if len(stored.states) != rows.tokens + 1:
                return False
            probe = rows.probe()
            with self._mixed():
                states = rows.gather(stored.states, probe, self.device)
                inputs = rows.inputs(probe, self.device)
                error = self._error(prefix, structure, inputs, states, rows.inside(probe))
            if not error <= _tolerance(states, self._training.resolved_precision()):
                return False
            self._verified.add(key)
        return True

    def _error(
        self,
        prefix: FrozenBlocks,
        structure: Structure,
        inputs: Mapping[str, Tensor],
        states: Tensor,
        inside: Tensor,
    ) -> float:
        """Return how far serving is off: the largest relative difference of a token's states or of logits."""
        model = self._backbone.model
        seen: list[Tensor] = []
        with prefix.looking(seen.append):
            plain = model(**inputs).logits.float()
        with prefix.serving(states, structure):
            served = model(**inputs).logits.float()
        given, expected = (one[inside.to(one.device)].float() for one in (states, seen[0]))
        of_states = (given - expected).norm(dim=-1) / expected.norm(dim=-1)
        of_logits = (served - plain).abs().max() / plain.abs().max()
        return float(torch.maximum(of_states.max(), of_logits))

    def _mixed(self) -> AbstractContextManager[None]:
        """Compute in the training's precision."""
        return self._backbone.computing_in(self._training.resolved_precision())


class TrialHiddenStates:
    """What lies below one trial's lowest adapter.

    Args:
        cache: Has the hidden states.
        prefix: The frozen prefix, entered; None where none is held apart.
    """

    def __init__(self, cache: HiddenStateCache, prefix: FrozenBlocks | None) -> None:
        self._cache = cache
        self._prefix = prefix
        self._opened: _Opened | None = None
        self._started = 0.0
        self._serve_seconds = 0.0
        self._saved_seconds = 0.0

    def open(self) -> None:
        """Get the hidden states that training and validation will be served, if that pays."""
        if self._prefix is not None:
            self._opened = self._cache.open(self._prefix)
        self._started = self._cache.clock()

    def close(self) -> None:
        """Let go of the files: what a trainer refers to lives on until Python looks for cycles."""
        self._opened = None

    @contextmanager
    def serve(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        """Leave the prefix out of forward passes over a batch, if its hidden states are at hand."""
        found = rows_of(batch)
        if self._opened is None or self._prefix is None or found is None:
            yield
            return
        started = self._cache.clock()
        split, numbers = found
        rows, stored = self._opened.splits[split]
        chosen = numbers.tolist()
        states = rows.gather(stored.states, chosen, self._cache.device)
        rate = float(stored.notes[SECONDS_PER_TOKEN])
        self._saved_seconds += rate * float(rows.lengths[chosen].sum())
        self._serve_seconds += self._cache.clock() - started
        with self._prefix.serving(states, self._opened.structure):
            yield

    def record(self) -> dict[str, float]:
        """Record what serving gave since `open`, beside what was expected, and return it as values."""
        if self._opened is None or self._prefix is None or not self._serve_seconds:
            return {}
        elapsed = self._cache.clock() - self._started
        saved = self._saved_seconds - self._serve_seconds
        use = HiddenStateUse(
            cut=self._prefix.cut,
            estimated_share=self._opened.expected.share,
            share=saved / (elapsed + saved),
            seconds_saved=saved,
            fill_seconds=self._opened.fill_seconds,
        )
        self._cache.uses.append(use)
        _logger.log(
            logging.WARNING if saved < 0 else logging.INFO,
            "Leaving out %d frozen blocks saved %.0f %% of the training's time, expected were %.0f %%.",
            use.cut,
            100 * use.share,
            100 * use.estimated_share,
        )
        return {
            SECONDS_SAVED: use.seconds_saved,
            "prefix_seconds_saved_share": use.share,
            "prefix_seconds_saved_share_estimated": use.estimated_share,
        }


def _tolerance(states: Tensor, precision: str) -> float:
    """Return the largest relative difference that is rounding."""
    return 1e-3 if states.dtype == torch.float32 and precision == "32-true" else 0.1
