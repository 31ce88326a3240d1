"""Sequence to sequence: one text from another, as by T5 and BART."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from autopeft.core.errors import check_whole
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitName
from autopeft.tasks.batch import IGNORED, LABELS
from autopeft.tasks.dataset_loading import check_columns, check_text
from autopeft.tasks.dataset_task import ColumnKind
from autopeft.tasks.encoder_decoder_task import EncoderDecoderTask
from autopeft.tasks.grouped_data import RowData
from autopeft.tasks.length_bucketing import TokenisedSplit, longest_labels
from autopeft.tasks.tokenization import tokenise


class _PairData(RowData):
    """Batches of sources of like length."""

    @cached_property
    def _largest(self) -> Batch:
        """The longest sources with the longest targets: no drawn batch has a larger shape."""
        return super()._largest | {LABELS: longest_labels(self.split("train").labels, self.batch_size)}


@dataclass(frozen=True, eq=False)
class Seq2Seq(EncoderDecoderTask):
    """Fine-tune an encoder-decoder to write one text for another: translations, summaries, corrections.

    Metrics are those of `LanguageTask`. Its attributes and errors, and:

    Attributes:
        source: The column with the text that is read.
        target: The column with the text that is written. Rows without one are left out.
        prefix: Text before each source, as T5's "summarize: ".
        target_length: Tokens of a target at most; longer ones are cut at their end.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"source": "text", "target": "text"}
    recognised_by: ClassVar[frozenset[str]] = frozenset({"source", "target"})

    _: KW_ONLY
    source: str = "source"
    prefix: str = ""
    target_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("target_length", self.target_length, least=1)
        if self.source == self.target:
            raise ValueError(f"source and target are two columns, got {self.source!r} for both.")

    @property
    def head(self) -> HeadSpec:
        """The model's own, which is not trained."""
        return HeadSpec(auto_class=AutoModelForSeq2SeqLM, is_trained=False)

    def _usable(self, split: Dataset, name: str) -> Sequence[int]:
        check_columns(split, name, self.source)
        check_text(split, name, self.source)
        return super()._usable(split, name)

    @cached_property
    def _keys(self) -> list[str]:
        return [str(text) for text in self._sources["train"][self.source][:]]

    def _columns(self, name: SplitName) -> tuple[list[str], list[str]]:
        source, rows = self._drawn(name)
        texts = self._sources[source].select(rows)[self.source][:]
        return [self.prefix + (text or "") for text in texts], self._targets(name)

    def data(
        self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, seed: int, cache: Path | None = None
    ) -> RowData:
        """Return the tokenised splits; see `Task.data`."""
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"  # an encoder's positions count from the first token

        def read(name: SplitName) -> TokenisedSplit:
            sources, targets = self._columns(name)
            tokens, offsets = tokenise(tokenizer, [sources], self.max_length, cache)
            rows = [self._ended(ids, tokenizer) for ids in tokenizer(text_target=targets)["input_ids"]]
            return TokenisedSplit(tokens, offsets, self._labels(rows, name, "target_length"))

        return _PairData(read, tokenizer, batch_size=batch_size, seed=seed)

    def _learnt(self, data: RowData, name: SplitName) -> NDArray[np.int64]:
        labels = data.split(name).labels
        learnt: NDArray[np.int64] = labels[labels != IGNORED]
        return learnt

    def _examples(self, data: RowData, name: SplitName) -> tuple[Sequence[Sequence[int]], list[str]]:
        split = data.split(name)
        prompts = [split.features(row)["input_ids"] for row in range(len(split))]
        return prompts, [text.strip() for text in self._targets(name)]

    def _settings(self) -> dict[str, str]:
        own = {name: str(getattr(self, name)) for name in ("source", "target", "prefix", "target_length")}
        return own | super()._settings()
