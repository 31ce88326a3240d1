"""Token classification: a label for each word of a text, as of its entities or parts of speech."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitName, TaskData
from autopeft.tasks.batch import IGNORED, LABELS
from autopeft.tasks.dataset_loading import TEXT
from autopeft.tasks.dataset_task import SPLITS, ColumnKind
from autopeft.tasks.label_column import check_known, label_texts
from autopeft.tasks.length_bucketing import TokenisedSplit
from autopeft.tasks.text_task import TextTask
from autopeft.tasks.tokenization import WORDS, tokenise
from autopeft.tasks.word_metrics import EntityF1, WordAccuracy

_logger = logging.getLogger(__name__)
_UNCOUNTED = (None, IGNORED)


@dataclass(frozen=True, eq=False)
class TokenClassification(TextTask):
    """Label each word of a text: its entities, or its parts of speech.

    A word's label is learnt at, and read from, the first of its tokens.

    Metrics: F1 of entities, see `EntityF1`; accuracy, the share of words with the right label.

    The attributes and errors of `TextTask`, and:

    Attributes:
        text: The column with a list of words a row.
        label: The column with a list of labels, one a word. Rows without a list are left out; words with -100
            or None for a label do not count.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"text": "list", "label": "list"}

    _: KW_ONLY
    text: str = "tokens"
    label: str = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.text, str):
            raise ValueError(f"text is one column with lists of words, got {self.text!r}.")

    def serve(self, pipeline: Any) -> dict[str, Any]:
        """Have texts cut as in training, of which this pipeline takes no argument; see `Task.serve`."""
        super().serve(pipeline)
        return {}

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        return Objective.score("f1"), Objective.score("accuracy")

    @property
    def head(self) -> HeadSpec:
        """A token classifier's, with the names of the labels."""
        return HeadSpec.of_labels(AutoModelForTokenClassification, self.labels)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels: the data set's own, or the sorted values of the lists."""
        train = self._sources["train"]
        own = getattr(train.features[self.label].feature, "names", None)
        return tuple(own or sorted({label for labels in self._names(train) for label in labels}))

    def _names(self, split: Dataset) -> list[list[str]]:
        """Return the names of each row's labels; words that do not count are left out."""
        feature = split.features[self.label].feature
        rows = (labels or () for labels in split[self.label][:])
        return [label_texts((label for label in row if label not in _UNCOUNTED), feature) for row in rows]

    def _check_inputs(self, split: Dataset, name: str) -> None:
        for column, expected in ((self.text, "a list of words"), (self.label, "a list of labels")):
            feature = split.features.get(column)
            inner = getattr(feature, "feature", None)
            is_wrong = inner is None or (column == self.text and getattr(inner, "dtype", None) not in TEXT)
            if feature is not None and is_wrong:
                raise ValueError(
                    f"Row 0 of the {name} split has {split[0][column]!r} in {column!r}, expected {expected}."
                )

    def _check_labels(self, split: Dataset, name: str) -> None:
        for row, (words, labels) in enumerate(zip(split[self.text][:], split[self.label][:], strict=True)):
            if None in (words or ()):
                raise ValueError(f"Row {row} of the {name} split has None for a word in {self.text!r}.")
            if labels is not None and len(labels) != len(words or ()):
                raise ValueError(
                    f"Row {row} of the {name} split has {len(labels)} labels in {self.label!r} for "
                    f"{len(words or ())} words in {self.text!r}, expected one a word."
                )

    def _read_labels(self, split: Dataset, name: str) -> tuple[tuple[int, ...], ...]:
        rows = split[self.label][:]
        values = list(dict.fromkeys(value for row in rows for value in row if value not in _UNCOUNTED))
        names = label_texts(values, split.features[self.label].feature)
        numbers = dict.fromkeys(_UNCOUNTED, IGNORED) | dict(
            zip(values, map(self.labels.index, names), strict=True)
        )
        return tuple(tuple(numbers[value] for value in row) for row in rows)

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        for name in self._sources:
            check_known(enumerate(self._names(self._loaded[name])), name, self.labels)
        super().validate()
        for name in SPLITS[:2]:
            if len({label for row in self.split(name).labels for label in row} - {IGNORED}) < 2:
                raise ValueError(
                    f"The words of the {name} split have one label only: use more data, another share, or "
                    f"more {name}_examples."
                )

    def _tokenised(
        self, tokenizer: PreTrainedTokenizerBase, name: SplitName, cache: Path | None
    ) -> TokenisedSplit:
        texts = self.split(name)
        tokens, offsets = tokenise(tokenizer, texts.columns, self.max_length, cache, words=True)
        words = tokens.pop(WORDS)
        rows = np.repeat(np.arange(len(texts.labels)), np.diff(offsets))
        begins = (words[1:] != words[:-1]) | (rows[1:] != rows[:-1])
        is_first = (words >= 0) & np.append(True, begins)
        labels = np.full(len(words), IGNORED)
        starts = np.cumsum([0, *map(len, texts.labels)])
        flat = np.fromiter((label for row in texts.labels for label in row), np.int64, starts[-1])
        labels[is_first] = flat[starts[rows[is_first]] + words[is_first]]
        if lost := len(flat) - np.count_nonzero(is_first):
            _logger.warning(
                f"{lost:,} of the {len(flat):,} words of the {name} split lie behind "
                f"max_length={self.max_length} tokens, or have no token: their labels do not count."
            )
        return TokenisedSplit(tokens, offsets, labels, token_labels=True)

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        return super().example_batch(rows, length) | {LABELS: torch.zeros(rows, length, dtype=torch.int64)}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross entropy a word, a scalar, of logits (rows, tokens, labels)."""
        logits, labels = output.logits.flatten(0, 1).float(), batch[LABELS].flatten()
        total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / self.weight(batch)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the number of words in a batch."""
        return (batch[LABELS] != IGNORED).sum().clamp(min=1)

    def metric_collection(self) -> MetricCollection:
        """Return F1 of entities and accuracy."""
        return MetricCollection({"f1": EntityF1(self.labels), "accuracy": WordAccuracy()})

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        metrics.update(output.logits.argmax(dim=-1), batch[LABELS])

    def trivial_score(self, metric: str, data: TaskData | None = None) -> float:
        """Return what always predicting the most frequent training label scores in validation."""
        counts = np.bincount(
            [label for row in self.split("train").labels for label in row if label != IGNORED]
        )
        measured = self.metric_collection()[self.metric(metric).name]
        for row in self.split("validation").labels:
            labels = torch.tensor([row])
            measured.update(torch.full_like(labels, int(counts.argmax())), labels)
        return float(measured.compute())

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {"labels": ", ".join(self.labels)}
