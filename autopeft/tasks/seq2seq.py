"""Sequence to sequence: one text from another, as by T5 and BART."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from autopeft.core.errors import check_whole, unknown_choice
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitName
from autopeft.tasks.batch import IGNORED, LABELS, model_inputs
from autopeft.tasks.dataset_loading import check_text
from autopeft.tasks.label_column import labelled_rows
from autopeft.tasks.language_task import LanguageTask
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.row_data import RowData
from autopeft.tasks.tokenization import tokenise

_logger = logging.getLogger(__name__)


class _PairData(RowData):
    """Batches of sources of like length."""

    @cached_property
    def _largest(self) -> Batch:
        """The longest sources with the longest targets: no drawn batch has a larger shape."""
        targets = self.split("train").labels
        longest = np.argsort(-(targets != IGNORED).sum(axis=1), kind="stable")[: self.batch_size]
        return super()._largest | {LABELS: torch.from_numpy(targets[longest])}


@dataclass(frozen=True, eq=False)
class Seq2Seq(LanguageTask):
    """Fine-tune an encoder-decoder to write one text for another: translations, summaries, corrections.

    Metrics are those of `LanguageTask`. The attributes of it, and:

    Attributes:
        source: The column with the text that is read.
        target: The column with the text that is written. Rows without one are left out.
        prefix: Text before each source, as T5's "summarize: ".
        target_length: Tokens of a target at most; longer ones are cut at their end.

    Raises:
        ValueError: A setting is out of its range; the data are checked by `validate`.
    """

    _: KW_ONLY
    source: str = "source"
    target: str = "target"
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

    def _usable(self, split: Dataset, name: str) -> Dataset:
        for column in (self.source, self.target):
            if column not in split.column_names:
                if column == self.target and name == "test":
                    continue
                raise unknown_choice(f"column of the {name} split", column, split.column_names)
            check_text(split, name, column)
        return labelled_rows(split, name, (self.target,), (None, ""))

    @cached_property
    def _keys(self) -> list[str]:
        return [str(text) for text in self._sources["train"][self.source][:]]

    def _columns(self, name: SplitName) -> tuple[list[str], list[str]]:
        source, rows = self._drawn(name)
        split = self._sources[source].select(rows)
        return [self.prefix + (text or "") for text in split[self.source][:]], split[self.target][:]

    def data(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        cache: Path | None = None,
    ) -> RowData:
        """Return the tokenised splits; see `Task.data`."""
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"  # an encoder's positions count from the first token

        def read(name: SplitName) -> TokenisedSplit:
            sources, targets = self._columns(name)
            tokens, offsets = tokenise(tokenizer, [sources], self.max_length, cache)
            rows = [self._ended(ids, tokenizer) for ids in tokenizer(text_target=targets)["input_ids"]]
            if cut := sum(len(ids) > self.target_length for ids in rows):
                _logger.warning(
                    "%s of the %s targets of the %s split are cut at target_length=%s tokens.",
                    f"{cut:,}",
                    f"{len(rows):,}",
                    name,
                    self.target_length,
                )
            labels = np.full((len(rows), self.target_length), IGNORED)
            for row, ids in zip(labels, rows, strict=True):
                row[: len(ids)] = ids[: self.target_length]
            return TokenisedSplit(tokens, offsets, labels[:, (labels != IGNORED).any(axis=0)])

        return _PairData(read, tokenizer, batch_size=batch_size, seed=seed)

    @staticmethod
    def _ended(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return a target's tokens with the end token, which not every tokenizer writes."""
        end = tokenizer.eos_token_id
        return [*ids] if end is None or end in ids[-1:] else [*ids, end]

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return a model's output for a batch, given what was written before each label."""
        before: Any = model.prepare_decoder_input_ids_from_labels
        written = before(labels=batch[LABELS])
        return model(**model_inputs(batch), decoder_input_ids=written, use_cache=False)

    def _predicted_labels(self, labels: Tensor) -> Tensor:
        return labels

    def _learnt(self, data: RowData, name: SplitName) -> NDArray[np.int64]:
        labels = data.split(name).labels
        learnt: NDArray[np.int64] = labels[labels != IGNORED]
        return learnt

    def _examples(self, data: RowData, name: SplitName) -> tuple[Sequence[Sequence[int]], list[str]]:
        split = data.split(name)
        prompts = [split.features(row)["input_ids"] for row in range(len(split))]
        return prompts, [text.strip() for text in self._columns(name)[1]]

    def _settings(self) -> dict[str, str]:
        own = {name: str(getattr(self, name)) for name in ("source", "target", "prefix", "target_length")}
        return own | super()._settings()
