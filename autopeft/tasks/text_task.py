"""What tasks have in common whose rows are a text, or a pair of texts, with a label."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from autopeft.core.errors import check_whole
from autopeft.tasks.base import Batch, SplitName
from autopeft.tasks.dataset_loading import check_text
from autopeft.tasks.grouped_data import RowData
from autopeft.tasks.labelled_task import LabelledTask
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.tokenization import tokenise

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledTexts:
    """One split: columns of texts (or of lists of words), and a label a row."""

    columns: tuple[tuple[Any, ...], ...]
    labels: tuple[Any, ...]

    def rows(self, rows: Sequence[int]) -> LabelledTexts:
        """Return some of the rows."""
        columns = tuple(tuple(column[row] for row in rows) for column in self.columns)
        return LabelledTexts(columns, tuple(self.labels[row] for row in rows))


@dataclass(frozen=True, eq=False)
class TextTask(LabelledTask):
    """A task whose rows are a text, or a pair of texts, with a label.

    The attributes and errors of `LabelledTask`, and:

    Attributes:
        text: The column with the text, or the two of a pair. Rows without any text are left out.
        max_length: Tokens a row at most.
    """

    _: KW_ONLY
    text: str | Sequence[str] = "text"
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_length", self.max_length, least=1)
        if len(self.columns) not in (1, 2) or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"text is one column, or two different ones, got {self.text!r}.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns: one, or two for pairs."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    def _check_inputs(self, split: Dataset, name: str) -> None:
        """Raise ValueError for columns of text that hold none, by their type."""
        for column in self.columns:
            check_text(split, name, column)

    def _read(self, name: SplitName) -> LabelledTexts:
        source, rows = self._parts[name]
        split = self._sources[source].select(rows)
        columns = tuple(tuple(text or "" for text in split[column][:]) for column in self.columns)
        texts = LabelledTexts(columns, self._read_labels(split, source))
        pairs = enumerate(zip(*columns, strict=True))
        filled = [row for row, pair in pairs if any("".join(text).strip() for text in pair)]  # or words
        if len(filled) < len(rows):
            _logger.warning(
                f"{len(rows) - len(filled):,} of the {len(rows):,} rows of the {name} split have no text and "
                "are left out."
            )
            texts = texts.rows(filled)
        return texts.rows(self._limited(name, texts.labels))

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        super().validate()
        for name in ("train", "validation"):
            if not self.split(name).labels:
                raise ValueError(f"The {name} split has no rows with text in {', '.join(self.columns)}.")

    def _columns(self, name: SplitName) -> Sequence[Sequence[object]]:
        split = self.split(name)
        return *split.columns, split.labels

    def _settings(self) -> dict[str, str]:
        own = {"text": ", ".join(self.columns), "max_length": str(self.max_length)}
        return super()._settings() | own

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows without labels; see `Task.example_batch`."""
        ids = torch.ones(rows, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone()}

    def serve(self, pipeline: Any) -> dict[str, Any]:
        """Have texts cut as in training; see `Task.serve`."""
        pipeline.tokenizer.model_max_length = self.max_length
        return {"truncation": True, "max_length": self.max_length}

    @property
    def served_example(self) -> Any:
        """A text, or a list with a pair under the names that transformers has for its texts."""
        return "A text." if len(self.columns) == 1 else [{"text": "A text.", "text_pair": "Another one."}]

    def _label_values(self, labels: Sequence[Any]) -> NDArray[Any]:
        return np.array(labels, dtype=np.int64)

    def data(
        self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, seed: int, cache: Path | None = None
    ) -> RowData:
        """Return the tokenised splits; see `Task.data`."""
        return RowData(
            lambda name: self._tokenised(tokenizer, name, cache), tokenizer, batch_size=batch_size, seed=seed
        )

    def _tokenised(
        self, tokenizer: PreTrainedTokenizerBase, name: SplitName, cache: Path | None
    ) -> TokenisedSplit:
        texts = self.split(name)
        tokens, offsets = tokenise(tokenizer, texts.columns, self.max_length, cache)
        return TokenisedSplit(tokens, offsets, self._label_values(texts.labels))
