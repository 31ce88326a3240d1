"""Image classification: one class an image."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from autopeft.core.errors import check_whole
from autopeft.models.head_spec import HeadSpec
from autopeft.tasks.base import Batch, RowCollator, SplitName
from autopeft.tasks.batch import LABELS, rows_key
from autopeft.tasks.classification_task import ClassificationTask
from autopeft.tasks.dataset_task import SPLITS, ColumnKind
from autopeft.tasks.file_split import FileSplit
from autopeft.tasks.grouped_data import GroupedData
from autopeft.tasks.length_bucketing import ShuffledBatches

_LEAST_AREA = 0.25
_LARGEST_RATIO = 4 / 3


class Images(FileSplit):
    """One split of images."""

    def _decoded(self, file: Mapping[str, Any]) -> PIL.Image.Image:
        """Return an image in red, green and blue."""
        return PIL.Image.open(io.BytesIO(self._bytes(file))).convert("RGB")


@dataclass(frozen=True)
class ImageCollator:
    """Make batches of images with a model's image processor.

    Attributes:
        split: Where the rows are.
        processor: The backbone's.
        name: Name of the split, for batches that say which rows they hold; None for those that do not.
        seed: Seed of the augmentation of rows that are numbered on from epoch to epoch; None for none.
    """

    split: Images
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
        images = [self.split.decoded(place) for place in places]
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


class ImageData(GroupedData):
    """Batches of images, which the processor makes all of one size.

    Args:
        task: Gives the splits.
        processor: The backbone's.
        batch_size: Rows a batch.
        seed: Seed of shuffling and augmentation.
    """

    def __init__(
        self, task: ImageClassification, processor: BaseImageProcessor, *, batch_size: int, seed: int
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, workers=task.workers)
        self._task = task
        self._processor = processor

    def lengths(self, name: SplitName) -> NDArray[np.int64]:
        """Return 1 for each row."""
        return np.ones(len(self._task.split(name)), dtype=np.int64)

    def collator(self, name: SplitName) -> RowCollator | None:
        """Return what makes batches of a split's rows; None of training rows that are augmented."""
        return None if name == "train" and self._task.augment else super().collator(name)

    def _collator(self, name: SplitName, mark: SplitName | None) -> ImageCollator:
        return ImageCollator(self._task.split(name), self._processor, mark)

    def _training_collator(self, seed: int) -> ImageCollator:
        split, is_augmented = self._task.split("train"), self._task.augment
        return ImageCollator(split, self._processor, *((None, seed) if is_augmented else ("train", None)))

    def _shuffled(self, seed: int) -> ShuffledBatches:
        sampler = _NumberedOn if self._task.augment else ShuffledBatches
        return sampler(len(self._task.split("train")), self.batch_size, seed)


@dataclass(frozen=True, eq=False)
class ImageClassification(ClassificationTask):
    """Classify images.

    Metrics: accuracy; F1, the mean over classes (macro); Matthews correlation.

    The data set may also be a folder with a folder of images for each class, or one such folder a split. The
    attributes and errors of `ClassificationTask`, and:

    Attributes:
        image: The column with the image.
        augment: Whether training images are cropped and mirrored at random, anew in every epoch. Hidden
            states below the lowest adapter are then not kept: they would differ from epoch to epoch.
        workers: Processes that decode; 0 decodes in this one.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {"image": "image", "label": "class"}

    _: KW_ONLY
    image: str = "image"
    augment: bool = False
    workers: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("workers", self.workers, least=0)

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

    def _read(self, name: SplitName) -> Images:
        source, rows = self._parts[name]
        split = self._sources[source].select(rows)
        labels = self._read_labels(split, source)
        chosen = self._limited(name, labels)
        images = split.select(chosen).select_columns([self.image])
        return Images(
            images.cast_column(self.image, datasets.Image(decode=False)),
            tuple(labels[row] for row in chosen),
            source,
            [self._kept[source][rows[row]] for row in chosen],
        )

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings; every image is decoded once."""
        super().validate()
        for name in SPLITS[:2]:
            split = self.split(name)
            for row in range(len(split)):
                split.decoded(row)

    def example_batch(self, rows: int, length: int) -> Batch:
        """Return a batch of square images, `length` pixels a side; see `Task.example_batch`."""
        labels = torch.zeros(rows, dtype=torch.int64)
        return {"pixel_values": torch.zeros(rows, 3, length, length), LABELS: labels}

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
