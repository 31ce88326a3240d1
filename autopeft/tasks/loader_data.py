"""Splits that a user's own data loaders give."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch.utils.data import DataLoader

from autopeft.tasks.base import Batch, SplitData, SplitName
from autopeft.tasks.length_bucketing import ShuffledBatches


class LoaderData(SplitData):
    """The splits of ordinary data loaders, for a task of one's own.

    Training batches are of the loader's data set, batch size and collate function, in an order of autopeft's
    own: a seed stands for the same batches in every trial, and a paused training goes on in the middle of an
    epoch.

    Args:
        loader: Returns the loader of a split; that of the test split is not asked for before the end.
            Batches are mappings of names to tensors.
        seed: Seed of shuffling.

    Raises:
        ValueError: The training loader has no batch size, or streams its data.
    """

    def __init__(self, loader: Callable[[SplitName], DataLoader[Any]], *, seed: int) -> None:
        super().__init__()
        self._loader = loader
        self._seed = seed
        self._train = loader("train")
        if self._train.batch_size is None or not hasattr(self._train.dataset, "__len__"):
            raise ValueError(
                "The training loader needs a batch size and a data set with a length: batches of a stream "
                "cannot be drawn again."
            )

    def train_dataloader(self, seed: int | None = None) -> DataLoader[Batch]:
        """Return training batches, shuffled anew each epoch, by the seed or else by the data's own."""
        data: Any = self._train.dataset
        assert self._train.batch_size is not None  # checked when it was made
        batches = ShuffledBatches(len(data), self._train.batch_size, self._seed if seed is None else seed)
        return DataLoader(
            data,
            batch_sampler=batches,
            collate_fn=self._train.collate_fn,
            num_workers=self._train.num_workers,
        )

    def _evaluation_loader(self, name: SplitName) -> DataLoader[Batch]:
        return self._loader(name)

    @cached_property
    def _largest(self) -> Batch:
        """The largest training rows as one batch."""
        data: Any = self._train.dataset
        collate = self._train.collate_fn
        sizes = [sum(tensor.numel() for tensor in collate([row]).values()) for row in data]
        largest = sorted(range(len(sizes)), key=sizes.__getitem__)[-(self._train.batch_size or 1) :]
        batch: Batch = collate([data[index] for index in largest])
        return batch
