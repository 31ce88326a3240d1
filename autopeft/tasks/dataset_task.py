"""What tasks have in common whose examples are the rows of a data set: its source, splits and identity."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from datasets import Dataset

from autopeft.core.errors import check_whole
from autopeft.tasks.base import SplitName, Task
from autopeft.tasks.dataset_loading import Source, load_splits
from autopeft.tasks.splits import split_groups, three_parts
from autopeft.tasks.tokenization import fingerprint

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
ColumnKind = Literal["image", "recording", "list", "number", "class", "text", "other"]
"""What a column holds, as `autopeft init` tells from its type and values."""


@dataclass(frozen=True, eq=False)
class DatasetTask(Task):
    """A task whose examples are the rows of a data set.

    Attributes:
        needs: What the columns hold that settings name, by setting; `autopeft init` looks for such columns.
        recognised_by: Columns without which `autopeft init` does not take data for this task's.
        dataset: Hub name, a CSV, TSV, JSON, JSON-lines or Parquet file, a folder with one such file a
            split, a `datasets.Dataset` or a `DatasetDict`.
        subset: Configuration of a hub data set.
        train_examples: Use this many rows at most, drawn by seed; None for all.
        validation_examples: The same for validation.
        test_examples: The same for test.
        validation_share: Share of the training rows that becomes validation where there is none.
        test_share: Share of the training rows that becomes test where there is none.
        seed: Seed of splits and limits.

    Raises:
        ValueError: A setting is out of its range; the data are checked by `validate`.
    """

    needs: ClassVar[Mapping[str, ColumnKind]] = {}
    recognised_by: ClassVar[frozenset[str]] = frozenset()

    dataset: Source = field(repr=False)
    _: KW_ONLY
    subset: str | None = None
    train_examples: int | None = None
    validation_examples: int | None = None
    test_examples: int | None = None
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in SPLITS:
            if (limit := getattr(self, f"{name}_examples")) is not None:
                check_whole(f"{name}_examples", limit, least=1)
        shares = self.validation_share, self.test_share
        if min(shares) <= 0 or not sum(shares) < 1:
            raise ValueError(
                f"validation_share and test_share lie between 0 and 1, together below 1, got {shares}."
            )

    @property
    def name(self) -> str:
        """Short name for runs and folders."""
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__).lower()
        parts = (Path(self.dataset).stem, self.subset) if isinstance(self.dataset, str | Path) else ()
        return "-".join(filter(None, parts)) or kind

    def _usable(self, split: Dataset, name: str) -> Sequence[int]:
        """Return which rows of a split of the source can be learnt from.

        Raises:
            ValueError: They lack what the task needs.
        """
        return range(len(split))

    @abstractmethod
    def _cut(self, rows: Sequence[int], share: float) -> tuple[Sequence[int], Sequence[int]]:
        """Split rows of the training split in two; see `three_parts`."""

    def _columns(self, name: SplitName) -> Sequence[Sequence[object]]:
        """Return all that is used of a split, by column: here, every column."""
        source, rows = self._drawn(name)
        split = self._sources[source].select(rows)
        return [split[column][:] for column in split.column_names]

    @abstractmethod
    def _settings(self) -> Mapping[str, str]:
        """Return the settings that tell what is learnt from the rows, as text."""

    @cached_property
    def _loaded(self) -> dict[str, Dataset]:
        return load_splits(self.dataset, self.subset)

    @cached_property
    def _kept(self) -> dict[str, Sequence[int]]:
        """Which rows of the splits of the source are usable, of those that have any."""
        usable = {name: self._usable(split, name) for name, split in self._loaded.items()}
        if not len(usable["train"]):
            raise ValueError("The training split has no rows.")
        return {name: rows for name, rows in usable.items() if len(rows)}

    @cached_property
    def _sources(self) -> dict[str, Dataset]:
        """The usable rows of the splits of the source that have any."""
        return {name: self._loaded[name].select(rows) for name, rows in self._kept.items()}

    @cached_property
    def _parts(self) -> dict[str, tuple[str, Sequence[int]]]:
        """Which rows of which split of the source make each of the three splits."""
        sizes = {name: len(split) for name, split in self._sources.items()}
        return three_parts(sizes, {"test": self.test_share, "validation": self.validation_share}, self._cut)

    @cached_property
    def _read_splits(self) -> dict[SplitName, Any]:
        """What was read of the splits so far, by tasks that keep it."""
        return {}

    def _drawn(self, name: SplitName) -> tuple[str, Sequence[int]]:
        """Return which rows of which split of the source make a split, limited as asked for."""
        source, rows = self._parts[name]
        limit = getattr(self, f"{name}_examples")
        if limit is None or limit >= len(rows):
            return source, rows
        chosen = np.random.default_rng(self.seed).choice(len(rows), limit, replace=False)
        return source, [rows[index] for index in sorted(chosen)]

    def validate(self) -> None:
        """Raise ValueError for whatever is wrong with data or settings."""
        super().validate()
        for name in SPLITS:
            if not len(self._parts[name][1]):
                raise ValueError(f"The {name} split has no rows: use more data, or another share.")

    def identity(self) -> dict[str, str]:
        """Return data set, settings, and rows and fingerprint of what the search reads."""
        return dict(self._identity)

    @cached_property
    def _identity(self) -> dict[str, str]:
        read = {name: self._columns(name) for name in SPLITS[:2]}
        return {
            "class": type(self).__name__,
            "dataset": str(self.dataset) if isinstance(self.dataset, str | Path) else self.name,
            "subset": self.subset or "",
            **self._settings(),
            "content": fingerprint([column for columns in read.values() for column in columns]),
            **{f"{name}_rows": str(len(columns[0])) for name, columns in read.items()},
        }


@dataclass(frozen=True, eq=False)
class GroupedTask(DatasetTask):
    """A task of which several rows may be one example, as those with one prompt: they stay in one split."""

    @property
    @abstractmethod
    def _keys(self) -> Sequence[str]:
        """What tells examples of the training split apart, for each of its rows."""

    def _cut(self, rows: Sequence[int], share: float) -> tuple[Sequence[int], Sequence[int]]:
        keys = [self._keys[row] for row in rows]
        return split_groups(keys, max(1, round(share * len(rows))), self.seed)
