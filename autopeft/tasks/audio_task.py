"""What tasks have in common whose rows are recordings."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import datasets
from datasets import Dataset

from autopeft.core.errors import check_whole
from autopeft.tasks.base import SplitName
from autopeft.tasks.dataset_loading import TEXT, data_folder
from autopeft.tasks.dataset_task import SPLITS, DatasetTask
from autopeft.tasks.recordings import Recordings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AudioTask(DatasetTask):
    """A task whose rows are recordings.

    The attributes and errors of `DatasetTask`, and:

    Attributes:
        audio: The column with the recording: of the type `datasets.Audio`, names of files (from the data
            set's folder on), or mappings with "array" and "sampling_rate". Channels are averaged. WAV files
            are read as they are, others need soundfile (`autopeft[audio]`).
        resample: Whether recordings at another rate than the backbone's are resampled; if not, they are an
            error.
        max_seconds: Longer recordings are cut at their end.
        workers: Processes that decode; 0 decodes in this one.
    """

    _: KW_ONLY
    audio: str = "audio"
    resample: bool = False
    max_seconds: float = 30.0
    workers: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("workers", self.workers, least=0)
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds is above 0, got {self.max_seconds!r}.")

    @abstractmethod
    def recordings(self, name: SplitName) -> Recordings:
        """Return the recordings of one of the three splits, limited as asked for."""

    def _check_audio(self, split: Dataset, name: str) -> None:
        """Raise ValueError for a column that holds no recordings, by its type."""
        feature = split.features[self.audio]
        is_array = isinstance(feature, dict) and {"array", "sampling_rate"} <= set(feature)
        if not (isinstance(feature, datasets.Audio) or is_array or getattr(feature, "dtype", None) in TEXT):
            raise ValueError(
                f"Row 0 of the {name} split has {str(split[0][self.audio])[:80]!r} in {self.audio!r}, "
                "expected a recording (datasets.Audio), the name of its file, or a mapping with 'array' and "
                "'sampling_rate'."
            )

    def _recordings(self, source: str, rows: Sequence[int], labels: tuple[Any, ...]) -> Recordings:
        """Return recordings of some rows of a split of the source, which have these labels."""
        files = self._sources[source].select(rows).select_columns([self.audio])
        if isinstance(files.features[self.audio], datasets.Audio):
            files = files.cast_column(self.audio, datasets.Audio(decode=False))
        elif getattr(files.features[self.audio], "dtype", None) in TEXT:
            folder = data_folder(self.dataset)
            names = [str(folder / name) if name else None for name in files[self.audio][:]]
            files = Dataset.from_dict({self.audio: names})
        numbers = [self._kept[source][row] for row in rows]
        return Recordings(files, labels, source, numbers, self.resample, self.max_seconds)

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings; every recording is decoded once."""
        super().validate()
        for name in SPLITS[:2]:
            split = self.recordings(name)
            if cut := sum(samples > self.max_seconds * rate for samples, rate in split.sizes):
                _logger.warning(
                    f"{cut:,} of the {len(split):,} recordings of the {name} split are cut at "
                    f"max_seconds={self.max_seconds:g}."
                )

    def _audio_settings(self) -> dict[str, str]:
        return {name: str(getattr(self, name)) for name in ("audio", "resample", "max_seconds")}
