"""What a task promises: what to load, data, forward pass, loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from autopeft.core.errors import check_choice, unknown_choice
from autopeft.core.objectives import Objective
from autopeft.models.head_spec import HeadSpec
from autopeft.models.positions import check_positions
from autopeft.tasks.batch import IGNORED, LABELS, model_inputs

Batch = dict[str, Tensor]
SplitName = Literal["train", "validation", "test"]


class RowCollator(Protocol):
    """Makes batches of a split's rows, the same of a row each time."""

    def __len__(self) -> int: ...

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return a batch of these rows."""

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """Tokens of each row; None where a model makes as many of every row, as of images."""

    @property
    def left(self) -> bool:
        """Whether padding goes in front."""

    @property
    def fingerprint(self) -> str:
        """What tells apart what a model is given of the split; labels are left out."""


class TaskData(LightningDataModule, ABC):
    """The splits of a task, kept over all trials of a search.

    Guarantees: the same seed gives the same batches in the same order for every trial, and no row of the
    test split is read before `test_dataloader` is called.
    """

    @abstractmethod
    def train_dataloader(self, seed: int | None = None) -> DataLoader[Batch]:
        """Return training batches, shuffled anew each epoch, from the first epoch on."""

    @abstractmethod
    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches."""

    @abstractmethod
    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches; the first call reads the test split."""

    def collator(self, name: SplitName) -> RowCollator | None:
        """Return what makes batches of a split's rows, for hidden states kept by row; None to keep none."""
        return None

    @property
    def batches_per_epoch(self) -> int:
        """Number of training batches an epoch."""
        return len(self.train_dataloader())

    @abstractmethod
    def largest_batch(self) -> Batch:
        """Return a training batch of the largest shape that can be drawn, labels included."""


class SplitData(TaskData):
    """Splits that are evaluated alike, and whose largest batch is looked for once."""

    @abstractmethod
    def _evaluation_loader(self, name: SplitName) -> DataLoader[Batch]:
        """Return the batches of a split in an order of its own."""

    @property
    @abstractmethod
    def _largest(self) -> Batch: ...

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return validation batches."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return test batches; the first call reads the test split."""
        return self._evaluation_loader("test")

    def largest_batch(self) -> Batch:
        """Return a training batch of the largest shape that can be drawn, labels included."""
        return dict(self._largest)


class Task(ABC):
    """What to fine-tune for.

    Nothing outside `autopeft.tasks` knows what a batch, a label or a metric is.

    Guarantees:

    * `validate` raises every error that can be found without a model;
    * train, validation and test are three disjoint splits that depend on the settings alone;
    * the keys of `metric_collection` are the names of the `metrics` that are not `at_end`.

    Attributes:
        prediction: The field of the model's output that an export has to reproduce.
        trains_with_dropout: Whether the model's own dropout is on in training.
    """

    prediction: str = "logits"
    trains_with_dropout: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Short name for runs and folders."""
        return type(self).__name__

    @property
    @abstractmethod
    def metrics(self) -> tuple[Objective, ...]:
        """The metrics, the default one first."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What can be traded off beside what every task costs: the metrics, and speeds if it generates."""
        return self.metrics

    @property
    @abstractmethod
    def head(self) -> HeadSpec:
        """What a backbone is loaded with for this task."""

    @abstractmethod
    def data(self, processor: Any, *, batch_size: int, seed: int, cache: Path | None = None) -> TaskData:
        """Return the splits, ready for a model.

        Args:
            processor: The backbone's, as the head's `processor_class` loads it.
            batch_size: Examples that run through the model at once.
            seed: Seed of shuffling.
            cache: Folder for what the processor makes of the data; None to keep them in memory alone.

        Raises:
            ValueError: Data and processor do not go together.
        """

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of a shape, for counting what a training takes before there are data.

        Args:
            rows: Its rows.
            length: What each of them has: tokens, for a text; pixels a side, for an image.
        """
        raise ValueError(f"{type(self).__name__} has no batches without data.")

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        """Return a model's output for a batch."""
        return model(**model_inputs(batch))

    @property
    def is_one_pass(self) -> bool:
        """Whether `forward` is one pass of the model over `model_inputs`, which several trials can share.

        Here: whether it is `Task.forward`. The loss and the metrics then see the prediction alone, so a task
        of which they read another field of the output has to say False.
        """
        return type(self).forward is Task.forward

    def check_model(self, model: Any, data: TaskData) -> None:
        """Raise ValueError where a model cannot do what the task's batches ask of it.

        A search calls it before the first forward pass, with the model in evaluation mode. Here: rows are
        longer than the positions that it has learnt, which on a GPU would end the process.
        """
        for batch in (data.largest_batch(), next(iter(data.val_dataloader()))):
            if (mask := self.mask(batch)) is not None:
                check_positions(model, mask.shape[-1])

    def mask(self, batch: Mapping[str, Tensor], *, is_decoder: bool = False) -> Tensor | None:
        """Return which positions count, of shape (rows, positions); None where all do.

        Those of a decoder beside an encoder are those that have a label.
        """
        if is_decoder:
            labels = batch.get(LABELS)
            return None if labels is None else labels != IGNORED
        return batch.get("attention_mask")

    def predicted(self, output: Any) -> Tensor:
        """Return the tensor of the model's output that an export has to reproduce.

        Raises:
            ValueError: The output has no field of the name `prediction`.
        """
        if not hasattr(output, self.prediction):
            fields = [name for name, value in vars(output).items() if isinstance(value, Tensor)]
            raise unknown_choice(f"field of a {type(output).__name__}", self.prediction, fields)
        found: Tensor = getattr(output, self.prediction)
        return found

    @abstractmethod
    def loss(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss of a batch, a scalar, given the model's output.

        Its operations must not depend on the values of tensors: memory is counted on tensors without data.
        """

    def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return how much a batch's loss counts in the mean over a split, a scalar: its number of rows."""
        first = next(iter(batch.values()))
        return torch.tensor(len(first), device=first.device)

    @abstractmethod
    def metric_collection(self) -> MetricCollection:
        """Return fresh metrics, by name."""

    @abstractmethod
    def update_metrics(
        self, metrics: MetricCollection, output: Any, batch: Mapping[str, Tensor], loss: Tensor
    ) -> None:
        """Add a batch to the metrics.

        Args:
            metrics: What `metric_collection` returned.
            output: The model's.
            batch: The batch.
            loss: Its mean loss.
        """

    def measure_at_end(self, model: nn.Module, data: TaskData, split: SplitName) -> dict[str, float]:
        """Return the metrics that are `at_end`, by name, of a model in evaluation mode."""
        return {}

    def generate_tokens(self, model: nn.Module, data: TaskData, tokens: int) -> int:
        """Generate so many tokens for each of a few rows, and return how many these are together.

        Tasks do that which have `GENERATION_SPEEDS` among their objectives.
        """
        raise NotImplementedError(f"{type(self).__name__} generates nothing.")

    def serve(self, pipeline: Any) -> dict[str, Any]:
        """Prepare a pipeline of transformers' around the exported model to compute what was trained.

        Returns:
            The arguments of its calls, which a model registry keeps with it; here, none.
        """
        return {}

    @property
    def served_example(self) -> Any:
        """What such a pipeline can be asked, of no data set; None for what registries assume of its kind."""
        return None

    @abstractmethod
    def trivial_score(self, metric: str, data: TaskData) -> float:
        """Return what a model that learnt nothing scores in validation."""

    def best_score(self, metric: str) -> float:
        """Return the best value that a metric can take: 1 of a score, 0 of what is better when smaller."""
        return 1.0 if self.metric(metric).direction == "maximize" else 0.0

    def metric(self, name: str) -> Objective:
        """Return a metric by name.

        Raises:
            ValueError: The task has no such metric; the message names the nearest.
        """
        by_name = {metric.name: metric for metric in self.metrics}
        check_choice("metric", by_name, name)
        return by_name[name]

    def describe(self) -> str:
        """Return the settings, and what was found in the data, for people."""
        return repr(self)

    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Return what tells this task from others, as text: data, content fingerprint, splits."""

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings; here, metrics of one name."""
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"Metrics need names of their own, got {', '.join(names)}.")
