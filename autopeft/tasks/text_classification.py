"""Text classification: one text or a pair of texts, any number of classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitName, Task, TaskData
from autopeft.tasks.batch import LABELS
from autopeft.tasks.dataset_loading import Source, check_shares, load_splits, source_name
from autopeft.tasks.label_column import label_names, label_numbers, labelled_rows
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.row_data import RowData
from autopeft.tasks.splits import stratified_sample, stratified_split, three_parts
from autopeft.tasks.tokenization import fingerprint, tokenise

_logger = logging.getLogger(__name__)
_SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class LabelledTexts:
    """One split: columns of texts, and a label a row."""

    columns: tuple[tuple[str, ...], ...]
    labels: tuple[int, ...]


class _Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation that is 0 where it is undefined: one class alone predicted, or in the labels.

    torchmetrics 1.9 gives other values there (0.41 for a constant prediction of two classes), which would
    let a model that has learnt nothing onto the front.
    """

    def compute(self) -> Tensor:
        """Return the correlation, a scalar in [-1, 1]."""
        confusion: Tensor = self.confmat
        several = [(confusion.sum(axis) > 0).sum() > 1 for axis in (0, 1)]
        value: Tensor = super().compute()
        return value if all(several) else torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class TextClassification(Task):
    """Classify texts, or pairs of texts.

    Metrics: accuracy; F1, the mean over classes (macro); Matthews correlation.

    Attributes:
        dataset: Hub name, a CSV, TSV, JSON, JSON-lines or Parquet file, a folder with one such file a
            split, a `datasets.Dataset` or a `DatasetDict`.
        subset: Configuration of a hub data set.
        text: The column with the text, or the two of a pair. Rows without any text are left out.
        label: The column with the class, as text or number. Rows with the label -1 (GLUE's way to
            hold back labels), or with none, do not count as labelled and are left out.
        class_weights: Weight of each class in the loss: None for 1, "balanced" for the inverse of
            its frequency in training, or a weight by label name.
        max_length: Tokens a row at most.
        train_examples: Use this many rows at most, drawn by seed and stratified; None for all.
        validation_examples: The same for validation.
        test_examples: The same for test.
        validation_share: Share of the training rows that becomes validation where there is none.
        test_share: Share of the training rows that becomes test where there is none.
        seed: Seed of splits and limits.

    Raises:
        ValueError: A setting is out of its range; the data are checked by `validate`.
    """

    dataset: Source = field(repr=False)
    _: KW_ONLY
    subset: str | None = None
    text: str | Sequence[str] = "text"
    label: str = "label"
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    max_length: int = 128
    train_examples: int | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        columns = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        if len(columns) not in (1, 2) or len(set(columns)) != len(columns):
            raise ValueError(f"text is one column, or two different ones, got {self.text!r}.")
        if self.label in columns:
            raise ValueError(
                f"label names the column of classes, got {self.label!r}, which is a text column."
            )
        for name in ("max_length", "train_examples", "validation_examples", "test_examples"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, least=1)
        check_shares(self.validation_share, self.test_share)
        if isinstance(self.class_weights, str) and self.class_weights != "balanced":
            raise unknown_choice("class_weights", self.class_weights, ("balanced",))

    @property
    def name(self) -> str:
        """Short name for runs and folders."""
        return source_name(self.dataset, self.subset) or "text-classification"

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns: one, or two for pairs."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        return tuple(Objective.score(name) for name in ("accuracy", "f1", "matthews"))

    @property
    def head(self) -> HeadSpec:
        """A sequence classifier's, with the names of the labels."""
        return HeadSpec.of_labels(AutoModelForSequenceClassification, self.labels)

    @cached_property
    def _sources(self) -> dict[str, Dataset]:
        found = load_splits(self.dataset, self.subset)
        for name, split in found.items():
            for column in (*self.columns, self.label):
                if column not in split.column_names:
                    if column == self.label and name == "test":
                        continue
                    raise unknown_choice(f"column of the {name} split", column, split.column_names)
            if len(split) == 0 and name == "train":
                raise ValueError("The training split has no rows.")
        labelled = {name: labelled_rows(split, name, self.label) for name, split in found.items()}
        if not len(labelled["train"]):
            raise ValueError(f"The column {self.label!r} has no labels in the training split.")
        return {name: split for name, split in labelled.items() if len(split)}

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes: the data set's own, or the sorted values of the label column."""
        return label_names(self._sources["train"], self.label)

    def split(self, name: SplitName) -> LabelledTexts:
        """Return one of the three splits, limited as asked for. The search never asks for "test"."""
        if name not in self._read_splits:
            source, rows = self._parts[name]
            self._read_splits[name] = self._limited(name, self._whole(source), rows)
        return self._read_splits[name]

    @cached_property
    def _read_splits(self) -> dict[SplitName, LabelledTexts]:
        return {}

    @cached_property
    def _parts(self) -> dict[str, tuple[str, Sequence[int]]]:
        """Which rows of which split of the source make each of the three splits."""

        def cut(rows: Sequence[int], share: float) -> tuple[Sequence[int], Sequence[int]]:
            labels = self._whole("train").labels
            kept, taken = stratified_split([labels[row] for row in rows], share, self.seed)
            return kept.tolist(), taken.tolist()

        sizes = {name: len(split) for name, split in self._sources.items()}
        return three_parts(sizes, {"test": self.test_share, "validation": self.validation_share}, cut)

    def _whole(self, name: str) -> LabelledTexts:
        if name not in self._read_sources:
            self._read_sources[name] = self._read(name)
        return self._read_sources[name]

    @cached_property
    def _read_sources(self) -> dict[str, LabelledTexts]:
        return {}

    def _read(self, name: str) -> LabelledTexts:
        split = self._sources[name]
        columns = []
        for column in self.columns:
            values = ["" if value is None else value for value in split[column][:]]
            odd = next((row for row, value in enumerate(values) if not isinstance(value, str)), None)
            if odd is not None:
                raise ValueError(
                    f"Row {odd} of the {name} split has {values[odd]!r} in {column!r}, expected text."
                )
            columns.append(tuple(values))
        numbers = label_numbers(split, name, self.label, self.labels)
        return LabelledTexts(tuple(columns), tuple(numbers[value] for value in split[self.label][:]))

    def _limited(self, name: SplitName, texts: LabelledTexts, rows: Sequence[int]) -> LabelledTexts:
        filled = [row for row in rows if any(column[row].strip() for column in texts.columns)]
        if len(filled) < len(rows):
            _logger.warning(
                "%s of the %s rows of the %s split have no text and are left out.",
                f"{len(rows) - len(filled):,}",
                f"{len(rows):,}",
                name,
            )
        limit = getattr(self, f"{name}_examples")
        labels = [texts.labels[row] for row in filled]
        chosen = range(len(filled)) if limit is None else stratified_sample(labels, limit, self.seed)
        columns = tuple(tuple(column[filled[index]] for index in chosen) for column in texts.columns)
        return LabelledTexts(columns, tuple(labels[index] for index in chosen))

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        if len(self.labels) < 2:
            raise ValueError(
                f"The column {self.label!r} has one class only: {self.labels[0]!r} (rows with the label -1 "
                "count as rows without one)."
            )
        for name, source in self._sources.items():
            label_numbers(source, name, self.label, self.labels)
        for name in _SPLITS:
            if not len(self._parts[name][1]):
                raise ValueError(f"The {name} split has no rows: use more data, or another share.")
        for name in _SPLITS[:2]:
            present = set(self.split(name).labels)
            if not present:
                raise ValueError(f"The {name} split has no rows with text in {', '.join(self.columns)}.")
            if len(present) < 2:
                raise ValueError(
                    f"The {name} split has rows of one class only, {self.labels[present.pop()]!r}: nothing "
                    f"can be told from it. Use more data, another share, or more {name}_examples."
                )
        self._weights()

    def _weights(self) -> tuple[float, ...] | None:
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, str):
            train = self.split("train").labels
            counts = [train.count(index) for index in range(len(self.labels))]
            return tuple(len(train) / (len(counts) * max(1, count)) for count in counts)
        for name, weight in self.class_weights.items():
            if name not in self.labels:
                raise unknown_choice("label in class_weights", name, self.labels)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"The weight of {name!r} must be at least 0, got {weight!r}.")
        return tuple(float(self.class_weights.get(name, 1.0)) for name in self.labels)

    @cached_property
    def _known_weights(self) -> tuple[float, ...] | None:
        return self._weights()

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        ids = torch.ones(rows, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids.clone(), LABELS: torch.zeros(rows, dtype=torch.int64)}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross entropy, a scalar, of logits (rows, labels) and labels (rows,)."""
        logits: Tensor = output.logits.float()  # class weights are no powers of two
        # Made from the logits: memory is counted on tensors without data, which do not mix with others.
        weights = None if self._known_weights is None else logits.new_tensor(self._known_weights)
        return functional.cross_entropy(logits, batch[LABELS], weight=weights)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the weights of a batch's classes; without class weights, its number of rows."""
        labels = batch[LABELS]
        if self._known_weights is None:
            return labels.new_tensor(len(labels))
        return torch.tensor(self._known_weights, device=labels.device)[labels].sum()

    def metric_collection(self) -> MetricCollection:
        """Return accuracy, F1 and Matthews correlation."""
        classes = len(self.labels)
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
                "matthews": _Matthews(classes),
            }
        )

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        metrics.update(output.logits, batch[LABELS])

    def trivial_score(self, metric: str, data: TaskData | None = None) -> float:
        """Return what always predicting the most frequent training label scores in validation."""
        train = self.split("train").labels
        majority = max(range(len(self.labels)), key=train.count)
        labels = torch.tensor(self.split("validation").labels)
        collection = self.metric_collection()
        return float(collection[self.metric(metric).name](torch.full_like(labels, majority), labels))

    def best_score(self, metric: str) -> float:
        """Return the best value a metric can take."""
        return 1.0

    def identity(self) -> dict[str, str]:
        """Return data set, labels, and rows and fingerprint of what the search reads."""
        return dict(self._identity)

    @cached_property
    def _identity(self) -> dict[str, str]:
        read = {name: self.split(name) for name in _SPLITS[:2]}
        rows = {f"{name}_rows": str(len(split.labels)) for name, split in read.items()}
        content = [column for split in read.values() for column in (*split.columns, split.labels)]
        return {
            "class": type(self).__name__,
            "dataset": str(self.dataset) if isinstance(self.dataset, str | Path) else self.name,
            "subset": self.subset or "",
            "text": ", ".join(self.columns),
            "label": self.label,
            "labels": ", ".join(self.labels),
            "class_weights": str(self.class_weights),
            "max_length": str(self.max_length),
            "content": fingerprint(content),
            **rows,
        }

    def data(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        cache: Path | None = None,
    ) -> RowData:
        """Return the tokenised splits; see `Task.data`."""

        def read(name: SplitName) -> TokenisedSplit:
            texts = self.split(name)
            tokens, offsets = tokenise(tokenizer, texts.columns, self.max_length, cache)
            return TokenisedSplit(tokens, offsets, np.array(texts.labels, dtype=np.int64))

        return RowData(read, tokenizer, batch_size=batch_size, seed=seed)
