"""What tasks have in common whose rows have a label, or several, in columns of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar

from datasets import Dataset

from autopeft.tasks.base import SplitName
from autopeft.tasks.dataset_loading import check_columns
from autopeft.tasks.dataset_task import DatasetTask
from autopeft.tasks.label_column import labelled_rows
from autopeft.tasks.splits import stratified_sample, stratified_split


@dataclass(frozen=True, eq=False)
class LabelledTask(DatasetTask):
    """A task whose rows have a label.

    The attributes and errors of `DatasetTask`, and:

    Attributes:
        label: The column with the label, or several.
        no_label: What stands for no label; rows with it are left out.
    """

    no_label: ClassVar[tuple[object, ...]] = (None, -1)

    _: KW_ONLY
    label: str | Sequence[str] = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        for label in self.label_columns:
            if label in self.columns:
                raise ValueError(f"label names the column of labels, got {label!r}, which is read.")

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns of what a model is given."""

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels."""
        return (self.label,) if isinstance(self.label, str) else tuple(self.label)

    @abstractmethod
    def _check_inputs(self, split: Dataset, name: str) -> None:
        """Raise ValueError for columns that hold nothing a model can be given, by their type."""

    @abstractmethod
    def _check_labels(self, split: Dataset, name: str) -> None:
        """Raise ValueError for labels that are none; nothing else is read."""

    @abstractmethod
    def _read_labels(self, split: Dataset, name: str) -> tuple[Any, ...]:
        """Return the label of each row, as the loss takes it."""

    def _strata(self, labels: Sequence[Any]) -> Sequence[int]:
        """Return the kind of each label: splits and limits have of each kind its share."""
        return [0] * len(labels)

    def _usable(self, split: Dataset, name: str) -> Sequence[int]:
        lacks_labels = name == "test" and not set(self.label_columns) <= set(split.column_names)
        check_columns(split, name, *self.columns, *(() if lacks_labels else self.label_columns))
        if not len(split):
            return ()
        self._check_inputs(split, name)
        if not lacks_labels:
            self._check_labels(split, name)
        labelled = labelled_rows(split, name, self.label_columns, self.no_label)
        if name == "train" and not len(labelled):
            columns = ", ".join(map(repr, self.label_columns))
            raise ValueError(f"The column {columns} has no labels in the training split.")
        return labelled

    @cached_property
    def _train_strata(self) -> Sequence[int]:
        return self._strata(self._read_labels(self._sources["train"], "train"))

    def _cut(self, rows: Sequence[int], share: float) -> tuple[Sequence[int], Sequence[int]]:
        kept, taken = stratified_split([self._train_strata[row] for row in rows], share, self.seed)
        return kept.tolist(), taken.tolist()

    def split(self, name: SplitName) -> Any:
        """Return one of the three splits, with `labels`, limited as asked for.

        The search never asks for "test".
        """
        if name not in self._read_splits:
            self._read_splits[name] = self._read(name)
        return self._read_splits[name]

    @abstractmethod
    def _read(self, name: SplitName) -> Any:
        """Return one of the three splits."""

    def _limited(self, name: SplitName, labels: Sequence[Any]) -> list[int]:
        """Return which rows of a split are used, of each kind of label its share."""
        limit = getattr(self, f"{name}_examples")
        rows: list[int] = stratified_sample(self._strata(labels), limit or len(labels), self.seed).tolist()
        return rows

    def _settings(self) -> dict[str, str]:
        return {"label": ", ".join(self.label_columns)}
