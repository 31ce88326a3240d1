"""Image classification: one class an image."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, SplitData, SplitName
from autopeft.tasks.batch import LABELS, rows_key
from autopeft.tasks.classification_task import ClassificationTask
from autopeft.tasks.dataset_task import SPLITS
from autopeft.tasks.length_bucketing import ShuffledBatches

_LEAST_AREA = 0.25
_LARGEST_RATIO = 4 / 3


@dataclass(frozen=True)
class LabelledImages(torch.utils.data.Dataset[int]):
    """One split; images are read and decoded when they are asked for.

    Attributes:
        images: One column of images, not decoded.
        labels: The class of each row.
        source: Name of the split of the source it was taken from, for errors.
        rows: The rows' numbers there.
    """

    images: Dataset
    labels: tuple[int, ...]
    source: str
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> int:
        return index

    def image(self, row: int) -> PIL.Image.Image:
        """Return a row's image in red, green and blue.

        Raises:
            ValueError: It cannot be read.
        """
        try:
            return PIL.Image.open(io.BytesIO(self._bytes(row))).convert("RGB")
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            where = f"Row {self.rows[row]} of the {self.source} split"
            raise ValueError(f"{where} has no image that can be read: {error}.") from error

    def _bytes(self, row: int) -> bytes:
        (found,) = self.images[row].values()
        return found["bytes"] or Path(found["path"]).read_bytes()

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 (hex) of each row's file."""
        return tuple(hashlib.sha256(self._bytes(row)).hexdigest() for row in range(len(self)))


@dataclass(frozen=True)
class ImageCollator:
    """Make batches of images with a model's image processor.

    Attributes:
        split: Where the rows are.
        processor: The backbone's.
        name: Name of the split, for batches that say which rows they hold; None for those that do not.
        seed: Seed of the augmentation of rows that are numbered on from epoch to epoch; None for none.
    """

    split: LabelledImages
    processor: BaseImageProcessor
    name: str | None = None
    seed: int | None = None

    lengths = None
    left = False

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the images and the processor's settings."""
        parts = (*self.split.digests, self.processor.to_json_string())
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.split)

    def __call__(self, rows: Sequence[int]) -> Batch:
        """Return a batch: pixel_values, of shape (rows, channels, height, width), and labels."""
        places = [row % len(self) for row in rows]
        images = [self.split.image(place) for place in places]
        if self.seed is not None:
            images = [
                augmented(image, np.random.default_rng((self.seed, row)))
                for image, row in zip(images, rows, strict=True)
            ]
        batch: dict[str, Tensor] = dict(self.processor(images, return_tensors="pt"))
        batch[LABELS] = torch.tensor([self.split.labels[place] for place in places])
        if self.name is not None:
            batch[rows_key(self.name)] = torch.tensor(places)
        return batch


def augmented(image: PIL.Image.Image, generator: np.random.Generator) -> PIL.Image.Image:
    """Return a part of an image at its size, mirrored in half of the cases.

    The part has a quarter of the area at least, and other proportions by 4 to 3 at most.
    """
    if generator.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    share = generator.uniform(_LEAST_AREA, 1)
    ratio = math.exp(generator.uniform(-1, 1) * math.log(_LARGEST_RATIO))
    width = image.width * min(1, math.sqrt(share * ratio))
    height = image.height * min(1, math.sqrt(share / ratio))
    left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, PIL.Image.Resampling.BICUBIC, box=box)


class _NumberedOn(ShuffledBatches):
    """Batches of rows whose numbers go on from epoch to epoch, so that each is augmented anew."""

    def __iter__(self) -> Iterator[list[int]]:
        first = self.epoch * self.rows
        return ([first + row for row in rows] for rows in super().__iter__())


class ImageData(SplitData):
    """Batches of images.

    Args:
        task: Gives the splits.
        processor: The backbone's.
        batch_size: Rows a batch.
        seed: Seed of shuffling and augmentation.
    """

    def __init__(
        self, task: ImageClassification, processor: BaseImageProcessor, *, batch_size: int, seed: int
    ) -> None:
        super().__init__()
        self._task = task
        self._processor = processor
        self._batch_size = batch_size
        self._seed = seed

    def collator(self, name: SplitName) -> ImageCollator | None:
        """Return what makes batches of a split's rows; None of training rows that are augmented."""
        is_augmented = name == "train" and self._task.augment
        return None if is_augmented else ImageCollator(self._task.split(name), self._processor, name)

    def train_dataloader(self, seed: int | None = None) -> DataLoader[Batch]:
        """Return training batches, shuffled anew each epoch, by the seed or else by the data's own."""
        seed = self._seed if seed is None else seed
        split = self._task.split("train")
        sampler = _NumberedOn if self._task.augment else ShuffledBatches
        collate = self.collator("train") or ImageCollator(split, self._processor, seed=seed)
        batches = sampler(len(split), self._batch_size, seed)
        return DataLoader(split, batch_sampler=batches, collate_fn=collate)

    def _evaluation_loader(self, name: SplitName) -> DataLoader[Batch]:
        split = self._task.split(name)
        collate = ImageCollator(split, self._processor, None if name == "test" else name)
        return DataLoader(split, batch_size=self._batch_size, collate_fn=collate)

    @cached_property
    def _largest(self) -> Batch:
        """The first training rows as one batch: the processor makes all images of one size."""
        split = self._task.split("train")
        return ImageCollator(split, self._processor)(range(min(self._batch_size, len(split))))


@dataclass(frozen=True, eq=False)
class ImageClassification(ClassificationTask):
    """Classify images.

    Metrics: accuracy; F1, the mean over classes (macro); Matthews correlation.

    The data set may also be a folder with a folder of images for each class, or one such folder a split. The
    attributes of `ClassificationTask`, and:

    Attributes:
        image: The column with the image.
        augment: Whether training images are cropped and mirrored at random, anew in every epoch. Hidden
            states below the lowest adapter are then not kept: they would differ from epoch to epoch.

    Raises:
        ValueError: A setting is out of its range; the data are checked by `validate`.
    """

    _: KW_ONLY
    image: str = "image"
    augment: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of images."""
        return (self.image,)

    @property
    def head(self) -> HeadSpec:
        """An image classifier's, with the names of the labels."""
        return HeadSpec.of_labels(
            AutoModelForImageClassification, self.labels, processor_class=AutoImageProcessor
        )

    def _check_inputs(self, split: Dataset, name: str) -> None:
        if not isinstance(split.features[self.image], datasets.Image):
            raise ValueError(
                f"Row 0 of the {name} split has {split[0][self.image]!r} in {self.image!r}, expected an "
                "image (a column of the type datasets.Image)."
            )

    def _read(self, name: SplitName) -> LabelledImages:
        source, rows = self._parts[name]
        split = self._sources[source].select(rows)
        labels = self._read_labels(split, source)
        chosen = self._limited(name, labels)
        images = split.select(chosen).select_columns([self.image])
        return LabelledImages(
            images.cast_column(self.image, datasets.Image(decode=False)),
            tuple(labels[row] for row in chosen),
            source,
            [rows[row] for row in chosen],
        )

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings; every image is decoded once."""
        super().validate()
        for name in SPLITS[:2]:
            split = self.split(name)
            for row in range(len(split)):
                split.image(row)

    def _columns(self, name: SplitName) -> Sequence[Sequence[object]]:
        split = self.split(name)
        return split.digests, split.labels

    def _settings(self) -> dict[str, str]:
        return super()._settings() | {"image": self.image, "augment": str(self.augment)}

    def data(self, processor: Any, *, batch_size: int, seed: int, cache: Path | None = None) -> ImageData:
        """Return the splits; see `Task.data`. Nothing is kept in the cache folder."""
        if not isinstance(processor, BaseImageProcessor):
            raise ValueError(f"Expected an image processor for images, got a {type(processor).__name__}.")
        return ImageData(self, processor, batch_size=batch_size, seed=seed)
