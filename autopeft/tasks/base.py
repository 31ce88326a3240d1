"""What a task promises: data, head, loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from autopeft.tasks.length_bucketing import Collator

Batch = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
"""Maps logits and labels to a scalar, the mean over the batch's rows."""
SplitName = Literal["train", "validation", "test"]


class TaskData(LightningDataModule, ABC):
    """The tokenised splits of a task, kept over all trials of a search.

    Guarantees: the same seed gives the same batches in the same order for every trial, and no text of the
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

    def collator(self, name: SplitName) -> Collator | None:
        """Return what makes batches of a split's rows, for hidden states kept by row; None to keep none."""
        return None

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Number of training batches an epoch."""

    @abstractmethod
    def largest_batch(self) -> Batch:
        """Return a training batch of the largest shape that can be drawn, labels included."""


class Task(ABC):
    """What to fine-tune for.

    Guarantees:

    * `validate` raises every error that can be found without training;
    * train, validation and test are three disjoint splits that depend on the settings alone;
    * the keys of `metric_collection` are `metrics`, all of them better when larger.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for runs and folders."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, the default one first."""

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The transformers auto class that gives a backbone this task's head."""

    @abstractmethod
    def model_options(self) -> dict[str, Any]:
        """Return what the model class needs to know: number and names of labels."""

    @abstractmethod
    def data(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        seed: int,
        cache: Path | None = None,
    ) -> TaskData:
        """Return the tokenised splits.

        Args:
            tokenizer: The backbone's.
            batch_size: Examples a training batch.
            seed: Seed of shuffling.
            cache: Folder for tokenised texts; None to keep them in memory alone.
        """

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, a scalar, of logits (batch, labels) and labels (batch,)."""

    @abstractmethod
    def metric_collection(self) -> MetricCollection:
        """Return fresh metrics, to be updated with logits (batch, labels) and labels (batch,)."""

    @abstractmethod
    def trivial_score(self, metric: str) -> float:
        """Return what always predicting the most frequent training label scores in validation."""

    @abstractmethod
    def best_score(self, metric: str) -> float:
        """Return the best value a metric can take."""

    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """Return what tells this task from others, as text: data, content fingerprint, splits."""

    @abstractmethod
    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
