"""What tasks have in common whose rows are a text, or a pair of texts, with a label."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from autopeft.core.errors import check_whole, unknown_choice
from autopeft.tasks.base import Batch, SplitName
from autopeft.tasks.dataset_task import DatasetTask
from autopeft.tasks.label_column import labelled_rows
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.row_data import RowData
from autopeft.tasks.splits import stratified_sample, stratified_split
from autopeft.tasks.tokenization import tokenise

_logger = logging.getLogger(__name__)
TEXT = ("string", "large_string", "null")
"""Types of a column of texts; "null" is one without any."""


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
class TextTask(DatasetTask):
    """A task whose rows are a text, or a pair of texts, with a label.

    The attributes of `DatasetTask`, and:

    Attributes:
        text: The column with the text, or the two of a pair. Rows without any text are left out.
        label: The column with the label, or several.
        max_length: Tokens a row at most.
        no_label: What stands for no label; rows with it are left out.
    """

    no_label: ClassVar[tuple[object, ...]] = (None, -1)

    _: KW_ONLY
    text: str | Sequence[str] = "text"
    label: str | Sequence[str] = "label"
    max_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("max_length", self.max_length, least=1)
        if len(self.columns) not in (1, 2) or len(set(self.columns)) != len(self.columns):
            raise ValueError(f"text is one column, or two different ones, got {self.text!r}.")
        for label in self.label_columns:
            if label in self.columns:
                raise ValueError(f"label names the column of labels, got {label!r}, which is a text column.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns: one, or two for pairs."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels."""
        return (self.label,) if isinstance(self.label, str) else tuple(self.label)

    def _check_text(self, split: Dataset, name: str) -> None:
        """Raise ValueError for columns of text that hold none, by their type."""
        for column in self.columns:
            if getattr(split.features[column], "dtype", None) not in TEXT:
                raise ValueError(
                    f"Row 0 of the {name} split has {split[0][column]!r} in {column!r}, expected text."
                )

    @abstractmethod
    def _check_labels(self, split: Dataset, name: str) -> None:
        """Raise ValueError for labels that are none; no text is read."""

    @abstractmethod
    def _read_labels(self, split: Dataset, name: str) -> tuple[Any, ...]:
        """Return the label of each row, as the loss takes it."""

    def _strata(self, labels: Sequence[Any]) -> Sequence[int]:
        """Return the kind of each label: splits and limits have of each kind its share."""
        return [0] * len(labels)

    def _usable(self, split: Dataset, name: str) -> Dataset:
        lacks_labels = name == "test" and not set(self.label_columns) <= set(split.column_names)
        for column in (*self.columns, *(() if lacks_labels else self.label_columns)):
            if column not in split.column_names:
                raise unknown_choice(f"column of the {name} split", column, split.column_names)
        if not len(split):
            return split
        self._check_text(split, name)
        if not lacks_labels:
            self._check_labels(split, name)
        labelled = labelled_rows(split, name, self.label_columns, self.no_label)
        if name == "train" and not len(labelled):
            columns = ", ".join(map(repr, self.label_columns))
            raise ValueError(f"The column {columns} has no labels in the training split.")
        return labelled

    @cached_property
    def _train_strata(self) -> Sequence[int]:
        return self._strata(self._read_labels(self._sources["train"], "train"))

    def _cut(self, rows: Sequence[int], share: float) -> tuple[Sequence[int], Sequence[int]]:
        kept, taken = stratified_split([self._train_strata[row] for row in rows], share, self.seed)
        return kept.tolist(), taken.tolist()

    def split(self, name: SplitName) -> LabelledTexts:
        """Return one of the three splits, limited as asked for. The search never asks for "test"."""
        if name not in self._read_splits:
            self._read_splits[name] = self._read(name)
        return self._read_splits[name]

    @cached_property
    def _read_splits(self) -> dict[SplitName, LabelledTexts]:
        return {}

    def _read(self, name: SplitName) -> LabelledTexts:
        source, rows = self._parts[name]
        split = self._sources[source].select(rows)
        columns = tuple(tuple(text or "" for text in split[column][:]) for column in self.columns)
        texts = LabelledTexts(columns, self._read_labels(split, source))
        pairs = enumerate(zip(*columns, strict=True))
        filled = [row for row, pair in pairs if any("".join(text).strip() for text in pair)]  # or words
        if len(filled) < len(rows):
            _logger.warning(
                "%s of the %s rows of the %s split have no text and are left out.",
                f"{len(rows) - len(filled):,}",
                f"{len(rows):,}",
                name,
            )
            texts = texts.rows(filled)
        limit = getattr(self, f"{name}_examples")
        if limit is None:
            return texts
        return texts.rows(stratified_sample(self._strata(texts.labels), limit, self.seed).tolist())

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
        return {
            "text": ", ".join(self.columns),
            "label": ", ".join(self.label_columns),
            "max_length": str(self.max_length),
        }

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows without labels; see `Task.example_batch`."""
        ids = torch.ones(rows, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone()}

    def _label_values(self, labels: Sequence[Any]) -> NDArray[Any]:
        return np.array(labels, dtype=np.int64)

    def data(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        cache: Path | None = None,
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
