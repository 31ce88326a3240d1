"""Audio classification: one class a recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, FeatureExtractionMixin

from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.audio_task import AudioTask
from autopeft.tasks.base import SplitName
from autopeft.tasks.classification_task import ClassificationTask
from autopeft.tasks.dataset_task import ColumnKind
from autopeft.tasks.recordings import AudioData, Recordings


@dataclass(frozen=True, eq=False)
class AudioClassification(ClassificationTask, AudioTask):
    """Classify recordings: spoken commands, sounds, speakers.

    Metrics: accuracy; F1, the mean over classes (macro); Matthews correlation.

    The data set may also be a folder with a folder of recordings for each class, or one such folder a split.
    The attributes and errors of `ClassificationTask` and of `AudioTask`.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"audio": "recording", "label": "class"}

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of recordings."""
        return (self.audio,)

    @property
    def head(self) -> HeadSpec:
        """An audio classifier's, with the names of the labels."""
        return HeadSpec.of_labels(
            AutoModelForAudioClassification, self.labels, processor_class=AutoFeatureExtractor
        )

    def _check_inputs(self, split: Dataset, name: str) -> None:
        self._check_audio(split, name)

    def recordings(self, name: SplitName) -> Recordings:
        """Return the recordings of one of the three splits, limited as asked for."""
        split: Recordings = self.split(name)
        return split

    def _read(self, name: SplitName) -> Recordings:
        source, rows = self._parts[name]
        labels = self._read_labels(self._sources[source].select(rows), source)
        chosen = self._limited(name, labels)
        return self._recordings(source, [rows[row] for row in chosen], tuple(labels[row] for row in chosen))

    def _columns(self, name: SplitName) -> Sequence[Sequence[object]]:
        split = self.split(name)
        return split.digests, split.labels

    def _settings(self) -> dict[str, str]:
        return super()._settings() | self._audio_settings()

    def data(self, processor: Any, *, batch_size: int, seed: int, cache: Path | None = None) -> AudioData:
        """Return the splits; see `Task.data`. Nothing is kept in the cache folder."""
        if not isinstance(processor, FeatureExtractionMixin):
            raise ValueError(f"Expected a feature extractor for audio, got a {type(processor).__name__}.")
        return AudioData(
            lambda name: (self.split(name), np.array(self.split(name).labels)),
            processor,
            batch_size=batch_size,
            seed=seed,
            workers=self.workers,
        )
