"""A task of a user's own on the learnable texts, written with no more than the contract asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks import LoaderData, Task, TaskData
from tests.learnable import learnable_rows


@dataclass(frozen=True)
class OwnTask(Task):
    """Texts of three classes."""

    rows: int = 48

    metrics = (Objective.score("accuracy"),)
    head = HeadSpec.of_labels(AutoModelForSequenceClassification, "abc")

    def data(
        self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, seed: int, cache: Path | None = None
    ) -> TaskData:
        """Return loaders of texts drawn by a seed a split."""

        def collate(rows: list[tuple[str, str]]) -> Any:
            texts, labels = zip(*rows, strict=True)
            tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
            return self.batch(dict(tokens) | {"labels": torch.tensor(["abc".index(name) for name in labels])})

        def loader(split: str) -> DataLoader[Any]:
            found = learnable_rows(self.rows, seed=len(split))
            pairs: Any = list(zip(found["text"], found["label"], strict=True))
            return DataLoader(pairs, batch_size, collate_fn=collate)

        return LoaderData(loader, seed=seed)

    def batch(self, batch: dict[str, Tensor]) -> Any:
        """Return what a batch is to be, for tasks derived from this one."""
        return batch

    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy."""
        return torch.nn.functional.cross_entropy(output.logits, batch["labels"])

    def metric_collection(self) -> MetricCollection:
        """Return the accuracy."""
        return MetricCollection({"accuracy": MeanMetric()})

    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch."""
        metrics["accuracy"].update((output.logits.argmax(-1) == batch["labels"]).float())

    def trivial_score(self, metric: str, data: TaskData) -> float:
        """Return the share of a class."""
        return 1 / 3

    def identity(self) -> Mapping[str, str]:
        """Return the number of texts."""
        return {"class": type(self).__name__, "rows": str(self.rows)}
