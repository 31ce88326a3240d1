"""Recordings: a split of them, and batches that a model's feature extractor makes."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor

from autopeft.tasks.base import Batch, RowCollator, SplitName
from autopeft.tasks.batch import LABELS, rows_key
from autopeft.tasks.file_split import FileSplit
from autopeft.tasks.grouped_data import GroupedData
from autopeft.tasks.length_bucketing import labels_of, longest_labels

Wave = NDArray[np.float32]
"""Samples of one channel, in [-1, 1]."""


@dataclass(frozen=True)
class Recordings(FileSplit):
    """One split of recordings.

    The attributes of `FileSplit`, and:

    Attributes:
        resample: Whether other rates than the one asked for are resampled.
        max_seconds: Longer recordings are cut at their end.
    """

    resample: bool
    max_seconds: float

    def _decoded(self, file: Mapping[str, Any]) -> tuple[Wave, int]:
        samples, rate = self._samples(file)
        if samples.dtype.kind in "iu":
            limits = np.iinfo(samples.dtype)
            half = (float(limits.max) - limits.min + 1) / 2
            samples = (samples - (limits.min + half)) / half
        wave = samples.astype(np.float32)
        wave = wave if wave.ndim == 1 else wave.mean(axis=1)
        if not len(wave) or not np.isfinite(wave).all():
            raise ValueError("it has no samples" if not len(wave) else "not all samples are numbers")
        return wave, rate

    def _samples(self, file: Mapping[str, Any]) -> tuple[NDArray[Any], int]:
        """Return samples, of shape (samples,) or (samples, channels), and their rate in Hz."""
        if "array" in file:
            return np.asarray(file["array"]), int(file["sampling_rate"])
        content = self._bytes(file)
        if content[:4] in (b"RIFF", b"RIFX", b"RF64"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of other programs
                warnings.filterwarnings("error", "Reached EOF", wavfile.WavFileWarning)
                try:
                    rate, samples = wavfile.read(io.BytesIO(content))
                except wavfile.WavFileWarning as error:
                    raise ValueError(str(error)) from error
            return samples, rate
        try:
            import soundfile
        except ImportError as error:
            raise ValueError(
                "it is no WAV file, and others need soundfile (pip install 'autopeft[audio]')"
            ) from error
        samples, rate = soundfile.read(io.BytesIO(content))
        return samples, rate

    @staticmethod
    def _bytes(file: Mapping[str, Any]) -> bytes:
        if "array" in file:
            return np.asarray(file["array"]).tobytes() + str(file["sampling_rate"]).encode()
        return FileSplit._bytes(file)

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Samples and rate of each row; every file is decoded once."""
        return tuple((len(wave), rate) for wave, rate in map(self.decoded, range(len(self))))

    def check_rate(self, row: int, found: int, rate: int) -> None:
        """Raise ValueError where a row is at another rate than wanted, and may not be resampled."""
        if found != rate and not self.resample:
            raise ValueError(
                f"{self.place(row)} has {found:,} samples a second, the backbone takes {rate:,}: pass "
                "resample=True to have them resampled."
            )

    def wave(self, row: int, rate: int) -> Wave:
        """Return a row's samples at a rate in Hz.

        Raises:
            ValueError: It cannot be read, or is at another rate and may not be resampled.
        """
        wave, found = self.decoded(row)
        self.check_rate(row, found, rate)
        wave = wave[: math.ceil(self.max_seconds * found)]
        resampled: Wave = wave if found == rate else resample_poly(wave, rate, found).astype(np.float32)
        return resampled

    def lengths(self, rate: int) -> NDArray[np.int64]:
        """Return the number of samples of each row at a rate in Hz."""
        samples, found = np.array(self.sizes).T
        cut = np.minimum(samples, np.ceil(self.max_seconds * found))
        lengths: NDArray[np.int64] = np.ceil(cut * rate / found).astype(np.int64)
        return lengths


@dataclass(frozen=True)
class AudioCollator:
    """Make batches of recordings with a model's feature extractor.

    Attributes:
        split: Where the rows are.
        extractor: The backbone's.
        labels: The label of each row, or several.
        padding: What the extractor is told of padding.
        name: Name of the split, for batches that say which rows they hold; None for those that do not.
    """

    split: Recordings
    extractor: Any
    labels: NDArray[Any]
    padding: Mapping[str, Any]
    name: str | None = None

    lengths = None
    left = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the recordings and the extractor's settings."""
        parts = (*self.split.digests, self.extractor.to_json_string(), str(self.split.max_seconds))
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.split)

    def features(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what a model is given of some rows."""
        rate = self.extractor.sampling_rate
        waves = [self.split.wave(row, rate) for row in rows]
        with torch.autocast("cpu", enabled=False):  # Whisper's extractor multiplies by torch
            return dict(self.extractor(waves, sampling_rate=rate, return_tensors="pt", **self.padding))

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return a batch: what the feature extractor makes, and labels."""
        batch = self.features(rows) | {LABELS: labels_of(rows, self.labels)}
        if self.name is not None:
            batch[rows_key(self.name)] = torch.tensor(rows)
        return batch


class AudioData(GroupedData):
    """Batches of recordings of like length.

    Args:
        read: Gives a split's recordings and their labels; called once a split, when it is first needed.
        extractor: The backbone's feature extractor.
        batch_size: Rows a training batch.
        seed: Seed of shuffling.
        workers: Processes that decode.
        tokenizer: The backbone's, of labels that are texts.

    Attributes:
        split: Returns a split's recordings and labels.

    Raises:
        ValueError: A recording is at another rate than the extractor's, and may not be resampled.
    """

    def __init__(
        self,
        read: Callable[[SplitName], tuple[Recordings, NDArray[Any]]],
        extractor: Any,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, workers=workers)
        self.tokenizer = tokenizer
        self._extractor = extractor
        self.split = cache(read)
        for name in ("train", "validation"):
            split, _ = self.split(name)
            for row, (_, rate) in enumerate(split.sizes):
                split.check_rate(row, rate, self._extractor.sampling_rate)

    def lengths(self, name: SplitName) -> NDArray[np.int64]:
        """Return the number of samples of each row of a split."""
        return self.split(name)[0].lengths(self._extractor.sampling_rate)

    @cached_property
    def _is_of_one_size(self) -> bool:
        """Whether the extractor gives as much for every recording, as Whisper's does."""
        rate = self._extractor.sampling_rate
        waves = (np.zeros(rate * seconds, dtype=np.float32) for seconds in (1, 2))
        made = [dict(self._extractor([wave], sampling_rate=rate, return_tensors="pt")) for wave in waves]
        return {name: each.shape for name, each in made[0].items()} == {
            name: each.shape for name, each in made[1].items()
        }

    def _collator(self, name: SplitName, mark: SplitName | None) -> AudioCollator:
        split, labels = self.split(name)
        padding = {} if self._is_of_one_size else {"padding": True}
        return AudioCollator(split, self._extractor, labels, padding, mark)

    def features(self, name: SplitName, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return what a model is given of some rows of a split."""
        return self._collator(name, None).features(rows)

    def collator(self, name: SplitName) -> RowCollator | None:
        """Return what makes batches of a split's rows; None where only the model knows their length."""
        return super().collator(name) if self._is_of_one_size else None

    @cached_property
    def _largest(self) -> Batch:
        """The longest recordings, with the longest texts: no drawn batch has a larger shape."""
        return super()._largest | {LABELS: longest_labels(self.split("train")[1], self.batch_size)}
