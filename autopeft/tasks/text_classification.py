"""Text classification: one text or a pair of texts, any number of classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import AutoModelForSequenceClassification

from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch
from autopeft.tasks.batch import LABELS
from autopeft.tasks.classification_task import ClassificationTask
from autopeft.tasks.dataset_task import ColumnKind
from autopeft.tasks.text_task import TextTask


@dataclass(frozen=True, eq=False)
class TextClassification(ClassificationTask, TextTask):
    """Classify texts, or pairs of texts.

    Metrics: accuracy; F1, the mean over classes (macro); Matthews correlation.

    The attributes and errors of `TextTask` and of `ClassificationTask`.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"text": "text", "label": "class"}

    @property
    def head(self) -> HeadSpec:
        """A sequence classifier's, with the names of the labels."""
        return HeadSpec.of_labels(AutoModelForSequenceClassification, self.labels)

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        return super().example_batch(rows, length) | {LABELS: torch.zeros(rows, dtype=torch.int64)}
