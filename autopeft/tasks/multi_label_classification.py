"""Multi-label classification: any number of labels for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelExactMatch, MultilabelF1Score
from transformers import AutoModelForSequenceClassification

from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, TaskData
from autopeft.tasks.batch import LABELS
from autopeft.tasks.dataset_task import SPLITS, ColumnKind
from autopeft.tasks.label_column import check_known, label_texts
from autopeft.tasks.text_task import TextTask

_Names = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class MultiLabelClassification(TextTask):
    """Say which of several labels a text, or a pair of texts, has: none, one or more.

    The loss is the mean binary cross entropy over rows and labels. A label counts as predicted from a
    probability of a half up.

    Metrics: F1 over all labels of all rows (micro), the mean of each label's F1 (macro), the share of rows
    with all labels right, and the mean over labels of the average precision.

    The attributes and errors of `TextTask`, and:

    Attributes:
        label: The column with a list of labels a row, or several columns of 0 and 1, which are the labels.
            Rows without a list, or with -1 or nothing in a column, are left out.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"text": "text", "label": "list"}

    _: KW_ONLY
    label: str | Sequence[str] = "label"

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        names = ("f1_micro", "f1_macro", "exact_match", "mean_average_precision")
        return tuple(map(Objective.score, names))

    @property
    def head(self) -> HeadSpec:
        """A sequence classifier's, with the names of the labels."""
        return HeadSpec.of_labels(
            AutoModelForSequenceClassification, self.labels, problem_type="multi_label_classification"
        )

    @cached_property
    def labels(self) -> _Names:
        """Names of the labels: the columns', the data set's own, or the sorted values of the lists."""
        if not isinstance(self.label, str):
            return self.label_columns
        train = self._sources["train"]
        own = getattr(train.features[self.label].feature, "names", None)
        return tuple(own or sorted({label for labels in self._names(train) for label in labels}))

    def _names(self, split: Dataset) -> list[_Names]:
        """Return the names of each row's labels; none of a row without labels."""
        if not isinstance(self.label, str):
            rows = zip(*(split[column][:] for column in self.label_columns), strict=True)
            return [
                tuple(name for name, has in zip(self.label_columns, row, strict=True) if has == 1)
                for row in rows
            ]
        feature = split.features[self.label].feature
        return [tuple(label_texts(labels or (), feature)) for labels in split[self.label][:]]

    def _check_labels(self, split: Dataset, name: str) -> None:
        for column in self.label_columns:
            is_list = isinstance(self.label, str)
            if is_list and hasattr(split.features[column], "feature"):
                continue
            expected = "a list of labels" if is_list else "0 or 1"
            for row, value in enumerate(split[column][:]):
                if is_list or (value not in (0, 1, *self.no_label) and value == value):
                    raise ValueError(
                        f"Row {row} of the {name} split has {value!r} in {column!r}, expected {expected}."
                    )

    def _read_labels(self, split: Dataset, name: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(label in names) for label in self.labels) for names in self._names(split))

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        if len(self.labels) < 2:
            raise ValueError(f"Expected at least two labels in {self.label!r}, got {self.labels}.")
        for name in self._sources:
            check_known(enumerate(self._names(self._loaded[name])), name, self.labels)
        super().validate()
        for name in SPLITS[:2]:
            if not any(map(any, self.split(name).labels)):
                raise ValueError(
                    f"No row of the {name} split has a label: use more data, another share, or more "
                    f"{name}_examples."
                )

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        labels = torch.zeros(rows, len(self.labels), dtype=torch.int64)
        return super().example_batch(rows, length) | {LABELS: labels}

    def serve(self, pipeline: Any) -> dict[str, Any]:
        """Have the probability of every label; see `Task.serve`."""
        return super().serve(pipeline) | {"top_k": None}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean binary cross entropy, a scalar, of logits and labels (rows, labels)."""
        logits = output.logits.float()
        return functional.binary_cross_entropy_with_logits(logits, batch[LABELS].to(logits.dtype))

    def metric_collection(self) -> MetricCollection:
        """Return F1 (micro and macro), exact match and mean average precision."""
        count = len(self.labels)
        # What torchmetrics would check of every batch is so by construction.
        f1_micro, f1_macro = (
            MultilabelF1Score(count, average=average, validate_args=False) for average in ("micro", "macro")
        )
        return MetricCollection(
            {
                "f1_micro": f1_micro,
                "f1_macro": f1_macro,
                "exact_match": MultilabelExactMatch(count, validate_args=False),
                "mean_average_precision": MultilabelAveragePrecision(count, validate_args=False),
            }
        )

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        # Not logits: torchmetrics takes those that happen to lie between 0 and 1 for probabilities.
        metrics.update(output.logits.float().sigmoid(), batch[LABELS])

    def trivial_score(self, metric: str, data: TaskData | None = None) -> float:
        """Return what always predicting each label's frequency in training scores in validation."""
        labels = torch.tensor(self.split("validation").labels)
        frequencies = torch.tensor(self.split("train").labels).float().mean(dim=0)
        collection = self.metric_collection()
        return float(collection[self.metric(metric).name](frequencies.expand(labels.shape), labels))

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {"labels": ", ".join(self.labels)}
