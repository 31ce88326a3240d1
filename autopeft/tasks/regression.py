"""Regression: a number for a text or a pair of texts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef
from transformers import AutoModelForSequenceClassification

from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, TaskData
from autopeft.tasks.batch import LABELS
from autopeft.tasks.dataset_task import SPLITS, ColumnKind
from autopeft.tasks.text_task import TextTask


class _Pearson(PearsonCorrCoef):
    """Pearson correlation that is 0 where it is undefined: all predictions are alike."""

    def compute(self) -> Tensor:
        """Return the correlation, a scalar in [-1, 1]."""
        return torch.nan_to_num(super().compute())


@dataclass(frozen=True, eq=False)
class Regression(TextTask):
    """Predict a number for a text, or for a pair of texts, as their similarity.

    The loss is the mean squared error. Numbers of a spread of about 1 are learnt best: divide larger ones.

    Metrics: Pearson's correlation, Spearman's rank correlation, and the root of the mean squared error.

    The attributes and errors of `TextTask`, and:

    Attributes:
        label: The column with the number. Rows without one are left out.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"text": "text", "label": "number"}

    no_label: ClassVar[tuple[object, ...]] = (None,)

    _: KW_ONLY
    label: str = "label"

    @property
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""
        rmse = Objective(name="rmse", direction="minimize", unit="of the label", is_metric=True)
        return Objective.score("pearson"), Objective.score("spearman"), rmse

    @property
    def head(self) -> HeadSpec:
        """A sequence classifier's, of one output."""
        return HeadSpec(
            auto_class=AutoModelForSequenceClassification,
            config={"num_labels": 1, "problem_type": "regression"},
        )

    def _check_labels(self, split: Dataset, name: str) -> None:
        for row, value in enumerate(split[self.label][:]):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and not math.isinf(value)):
                raise ValueError(
                    f"Row {row} of the {name} split has {value!r} in {self.label!r}, expected a number."
                )

    def _read_labels(self, split: Dataset, name: str) -> tuple[float, ...]:
        return tuple(map(float, split[self.label][:]))

    def _label_values(self, labels: Sequence[float]) -> NDArray[np.float32]:
        return np.array(labels, dtype=np.float32)

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        super().validate()
        for name in SPLITS[:2]:
            labels = self.split(name).labels
            if len(set(labels)) < 2:
                raise ValueError(
                    f"All rows of the {name} split have {labels[0]} in {self.label!r}: nothing can be told "
                    f"from it. Use more data, another share, or more {name}_examples."
                )

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of full rows; see `Task.example_batch`."""
        return super().example_batch(rows, length) | {LABELS: torch.zeros(rows)}

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean squared error, a scalar, of logits (rows, 1) and labels (rows,)."""
        return functional.mse_loss(output.logits[:, 0].float(), batch[LABELS])

    def metric_collection(self) -> MetricCollection:
        """Return Pearson's and Spearman's correlation and the root of the mean squared error."""
        with warnings.catch_warnings():  # ranks need every row, of which torchmetrics warns
            warnings.simplefilter("ignore", UserWarning)
            spearman = SpearmanCorrCoef()
        error = MeanSquaredError(squared=False)
        return MetricCollection({"pearson": _Pearson(), "spearman": spearman, "rmse": error})

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics."""
        metrics.update(output.logits[:, 0].float(), batch[LABELS])

    def trivial_score(self, metric: str, data: TaskData | None = None) -> float:
        """Return what always predicting the mean training label scores in validation."""
        if self.metric(metric).name != "rmse":
            return 0.0
        mean, labels = np.mean(self.split("train").labels), np.array(self.split("validation").labels)
        return float(np.sqrt(np.mean((labels - mean) ** 2)))
