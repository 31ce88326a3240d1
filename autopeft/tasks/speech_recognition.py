"""Speech recognition: the text of a recording, as by Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.audio_task import AudioTask
from autopeft.tasks.base import SplitName
from autopeft.tasks.batch import IGNORED
from autopeft.tasks.dataset_loading import check_columns
from autopeft.tasks.dataset_task import ColumnKind
from autopeft.tasks.encoder_decoder_task import EncoderDecoderTask
from autopeft.tasks.generation import TextMetric
from autopeft.tasks.recordings import AudioData, Recordings

_START = "<|startoftranscript|>"


@dataclass(frozen=True, eq=False)
class SpeechRecognition(EncoderDecoderTask, AudioTask):
    """Fine-tune an encoder-decoder to write down what is said in recordings.

    Recordings of one text stay in one split. Metrics are those of `LanguageTask`, of which the word error
    rate compares texts as they are, with case and punctuation. The attributes and errors of `LanguageTask`
    and of `AudioTask`, and:

    Attributes:
        target: The column with the text. Rows without one are left out.
        max_length: Tokens of a text at most; longer ones are cut at their end.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"audio": "recording", "target": "text"}
    recognised_by: ClassVar[frozenset[str]] = frozenset({"text"})

    _: KW_ONLY
    target: str = "text"
    max_length: int = 128
    generate: Sequence[str] | Mapping[str, TextMetric] = ("word_error_rate",)

    @property
    def head(self) -> HeadSpec:
        """The model's own, which is not trained."""
        return HeadSpec(auto_class=AutoModelForSpeechSeq2Seq, is_trained=False, processor_class=AutoProcessor)

    def _usable(self, split: Dataset, name: str) -> Sequence[int]:
        check_columns(split, name, self.audio)
        if len(split):
            self._check_audio(split, name)
        return super()._usable(split, name)

    @cached_property
    def _keys(self) -> list[str]:
        return [str(text) for text in self._sources["train"][self.target][:]]

    def recordings(self, name: SplitName) -> Recordings:
        """Return the recordings of one of the three splits, with their texts, limited as asked for."""
        if name not in self._read_splits:
            self._read_splits[name] = self._recordings(*self._drawn(name), tuple(self._targets(name)))
        found: Recordings = self._read_splits[name]
        return found

    def _columns(self, name: SplitName) -> Sequence[Sequence[object]]:
        split = self.recordings(name)
        return split.digests, split.labels

    def data(self, processor: Any, *, batch_size: int, seed: int, cache: Path | None = None) -> AudioData:
        """Return the splits; see `Task.data`. Nothing is kept in the cache folder."""
        tokenizer = getattr(processor, "tokenizer", None)
        extractor = getattr(processor, "feature_extractor", None)
        if tokenizer is None or extractor is None:
            raise ValueError(
                "Expected a processor of a feature extractor and a tokenizer for speech recognition, got a "
                f"{type(processor).__name__}."
            )

        def read(name: SplitName) -> tuple[Recordings, NDArray[np.int64]]:
            split = self.recordings(name)
            start = tokenizer.get_vocab().get(_START)  # which the decoder is given before the first label
            rows = [self._ended(ids, tokenizer) for ids in tokenizer(list(split.labels))["input_ids"]]
            rows = [ids[1:] if ids[0] == start else ids for ids in rows]
            return split, self._labels(rows, name, "max_length")

        return AudioData(
            read, extractor, batch_size=batch_size, seed=seed, workers=self.workers, tokenizer=tokenizer
        )

    def _written(self, model: nn.Module, labels: Tensor) -> Tensor:
        config: Any = model.config
        written = labels.roll(1, dims=1).masked_fill(labels.roll(1, dims=1) == IGNORED, config.pad_token_id)
        written[:, 0] = config.decoder_start_token_id
        return written

    def _learnt(self, data: AudioData, name: SplitName) -> NDArray[np.int64]:
        _, labels = data.split(name)
        learnt: NDArray[np.int64] = labels[labels != IGNORED]
        return learnt

    def _examples(self, data: AudioData, name: SplitName) -> tuple[Sequence[int], Sequence[str]]:
        texts = self.recordings(name).labels
        return range(len(texts)), [text.strip() for text in texts]

    def _inputs(
        self, model: nn.Module, data: AudioData, name: SplitName, examples: Sequence[Any]
    ) -> Mapping[str, Tensor]:
        return data.features(name, examples)

    def _settings(self) -> dict[str, str]:
        return {"target": self.target} | self._audio_settings() | super()._settings()
