"""What tasks have in common whose rows are of one class each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from autopeft.core.errors import check_choice
from autopeft.core.objectives import Objective
from autopeft.tasks.base import TaskData
from autopeft.tasks.batch import LABELS
from autopeft.tasks.dataset_task import SPLITS
from autopeft.tasks.label_column import check_classes, check_known, label_names, label_numbers, label_texts
from autopeft.tasks.labelled_task import LabelledTask


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
class ClassificationTask(LabelledTask):
    """A task whose rows are of one class each.

    Metrics: accuracy; F1, the mean over classes (macro); Matthews correlation.

    The attributes and errors of `LabelledTask`, and:

    Attributes:
        label: The column with the class, as text or number. Rows with the label -1 (GLUE's way to
            hold back labels), or with none, do not count as labelled and are left out.
        class_weights: Weight of each class in the loss: None for 1, "balanced" for the inverse of
            its frequency in training, or a weight by label name.
    """

    _: KW_ONLY
    label: str = "label"
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.class_weights, str):
            check_choice("class_weights", ("balanced",), self.class_weights)

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        return tuple(Objective.score(name) for name in ("accuracy", "f1", "matthews"))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes: the data set's own, or the sorted values of the label column."""
        return label_names(self._sources["train"], self.label, self._kept["train"])

    def _check_labels(self, split: Dataset, name: str) -> None:
        check_classes(split, name, self.label)

    def _read_labels(self, split: Dataset, name: str) -> tuple[int, ...]:
        numbers = label_numbers(split, name, self.label, self.labels)
        return tuple(numbers[value] for value in split[self.label][:])

    def _strata(self, labels: Sequence[int]) -> Sequence[int]:
        return labels

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        if len(self.labels) < 2:
            raise ValueError(
                f"The column {self.label!r} has one class only: {self.labels[0]!r} (rows with the label -1 "
                "count as rows without one)."
            )
        for name, source in self._sources.items():
            texts = label_texts(source[self.label][:], source.features[self.label])
            check_known(zip(self._kept[name], zip(texts), strict=True), name, self.labels)
        super().validate()
        for name in SPLITS[:2]:
            present = set(self.split(name).labels)
            if len(present) < 2:
                raise ValueError(
                    f"The {name} split has rows of one class only, {self.labels[present.pop()]!r}: nothing "
                    f"can be told from it. Use more data, another share, or more {name}_examples."
                )
        _ = self._weights  # says what is wrong with them

    @cached_property
    def _weights(self) -> tuple[float, ...] | None:
        if self.class_weights is None:
            return None
        if isinstance(self.class_weights, str):
            train = self.split("train").labels
            counts = [train.count(index) for index in range(len(self.labels))]
            return tuple(len(train) / (len(counts) * max(1, count)) for count in counts)
        for name, weight in self.class_weights.items():
            check_choice("label in class_weights", self.labels, name)
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"The weight of {name!r} must be at least 0, got {weight!r}.")
        return tuple(float(self.class_weights.get(name, 1.0)) for name in self.labels)

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean cross entropy, a scalar, of logits (rows, labels) and labels (rows,)."""
        logits: Tensor = output.logits.float()  # class weights are no powers of two
        # Made from the logits: memory is counted on tensors without data, which do not mix with others.
        weights = None if self._weights is None else logits.new_tensor(self._weights)
        return functional.cross_entropy(logits, batch[LABELS], weight=weights)

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the weights of a batch's classes; without class weights, its number of rows."""
        labels = batch[LABELS]
        if self._weights is None:
            return labels.new_tensor(len(labels))
        return torch.tensor(self._weights, device=labels.device)[labels].sum()

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

    def _settings(self) -> dict[str, str]:
        labels = {"labels": ", ".join(self.labels), "class_weights": str(self.class_weights)}
        return super()._settings() | labels
