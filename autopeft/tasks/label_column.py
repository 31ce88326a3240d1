"""The column of a data set that holds the class of each row."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, Value

from autopeft.core.errors import check_choice, nearest

_logger = logging.getLogger(__name__)


def labelled_rows(
    split: Dataset, name: str, columns: Sequence[str], missing: Sequence[object]
) -> Sequence[int]:
    """Return which rows of a split have a label; no text is read.

    Args:
        split: A split of the source.
        name: How errors and warnings call it.
        columns: The label columns; a split that lacks one has no labelled rows.
        missing: What stands for no label, beside NaN, which is what empty cells become.
    """
    if not set(columns) <= set(split.column_names):
        kept = []
    else:
        values = enumerate(zip(*(split[column][:] for column in columns), strict=True))
        kept = [row for row, found in values if all(own not in missing and own == own for own in found)]
        if len(kept) == len(split):
            return range(len(split))
    if kept or name == "train":
        # Loud, for -1 may have been meant as a class.
        _logger.warning(
            f"{len(split) - len(kept):,} of the {len(split):,} rows of the {name} split have no label "
            f"({' or '.join(map(str, missing))}) and are left out."
        )
    else:
        _logger.info("The %s split has no labels and is not used.", name)
    return kept


def label_names(train: Dataset, column: str, rows: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the classes: the data set's own, or the sorted values of the column.

    Rows are numbered in errors as given.

    Raises:
        ValueError: The values are fractions, or no two rows have the same.
    """
    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    values = train.unique(column)
    fraction = next((value for value in values if isinstance(value, float) and value != int(value)), None)
    if fraction is not None:
        raise ValueError(
            f"The column {column!r} holds fractions such as {fraction!r} (row "
            f"{rows[train[column][:].index(fraction)]} of the train split), expected classes: numbers are "
            "for the task Regression."
        )
    if len(values) == len(train) > 1:
        raise ValueError(
            f"Every row of the column {column!r} has a value of its own, such as {values[0]!r}: expected a "
            "few classes, each in several rows. Is another column meant by label?"
        )
    if all(isinstance(value, int | float) for value in values):
        return tuple(str(int(value)) for value in sorted(values))
    return tuple(sorted(map(str, values)))


def label_numbers(split: Dataset, name: str, column: str, labels: Sequence[str]) -> dict[Any, int]:
    """Return the index in `labels` of every value that occurs in a split's column.

    Raises:
        ValueError: A value is none of the labels.
    """
    values = list(dict.fromkeys(split[column][:]))
    texts = label_texts(values, split.features[column])
    check_choice(f"label in the {name} split", labels, *texts)
    return {value: labels.index(label) for value, label in zip(values, texts, strict=True)}


def check_known(rows: Iterable[tuple[int, Sequence[str]]], name: str, labels: Sequence[str]) -> None:
    """Raise a ValueError where a row of a split has a label that is none of the known ones.

    Args:
        rows: The number of each row, and its labels.
        name: Name of the split.
        labels: The known ones.
    """
    for row, found in rows:
        unknown = next((label for label in found if label not in labels), None)
        if unknown is not None:
            close = nearest(unknown, labels)
            raise ValueError(
                f"Row {row} of the {name} split has the label {unknown!r}, which training rows lack"
                + ("." if close is None else f"; did you mean {close!r}?")
            )


def label_texts(values: Iterable[Any], feature: Any) -> list[str]:
    """Return the names of labels: those of a `ClassLabel`, or the values as text, without ".0"."""
    if isinstance(feature, ClassLabel):  # its names may stand in another order than in training
        return [feature.int2str(value) for value in values]
    return [
        str(int(value)) if isinstance(value, int | float) and value == int(value) else str(value)
        for value in values
    ]


def check_classes(split: Dataset, name: str, column: str) -> None:
    """Raise a ValueError where a column does not hold one class a row."""
    if not isinstance(split.features[column], ClassLabel | Value):
        raise ValueError(
            f"Row 0 of the {name} split has {split[column][0]!r} in {column!r}, expected one class a row: "
            "several labels a text are for MultiLabelClassification, a label a token for TokenClassification."
        )
    infinite = [value for value in split.unique(column) if value in (math.inf, -math.inf)]
    if infinite:
        row = split[column][:].index(infinite[0])
        raise ValueError(f"Row {row} of the {name} split has {infinite[0]} in {column!r}, expected a class.")
