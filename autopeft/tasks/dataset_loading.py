"""Where data comes from: a hub name, a local file or folder, or loaded data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas
from datasets import Dataset, DatasetDict, IterableDataset

from autopeft.core.errors import check_choice

Source: TypeAlias = str | Path | Dataset | DatasetDict | Mapping[str, Dataset]
_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_RECORDINGS = {".wav", ".flac", ".mp3", ".ogg", ".opus"}
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "validation_matched": "validation",
    "test": "test",
}

TEXT = ("string", "large_string", "null")
"""Types of a column of texts; "null" is one without any."""


def check_columns(split: Dataset, name: str, *columns: str) -> None:
    """Raise ValueError where a split lacks one of some columns."""
    check_choice(f"column of the {name} split", split.column_names, *columns)


def check_text(split: Dataset, name: str, column: str) -> None:
    """Raise ValueError for a column that holds no text, by its type."""
    if len(split) and getattr(split.features[column], "dtype", None) not in TEXT:
        raise ValueError(f"Row 0 of the {name} split has {split[0][column]!r} in {column!r}, expected text.")


def load_splits(source: Source, subset: str | None) -> dict[str, Dataset]:
    """Return the splits a source has, under the names train, validation and test.

    Args:
        source: Hub name, a CSV, TSV, JSON, JSON-lines or Parquet file, a folder with one such file a
            split, or loaded data.
        subset: Configuration of a hub data set; None otherwise.

    Raises:
        ValueError: The source cannot be read, or has no training split.
    """
    if isinstance(source, Dataset | IterableDataset):
        found: Mapping[str, Dataset] = {"train": source}
    elif isinstance(source, Mapping):
        found = source
    else:
        found = _from_path(str(source), subset)
    splits: dict[str, Dataset] = {}
    for name, split in found.items():
        if not isinstance(split, Dataset):
            raise ValueError(
                f"The split {name!r} is a {type(split).__name__}, expected a datasets.Dataset: streamed rows "
                "cannot be drawn again for each trial. Load it without streaming=True."
            )
        role = _SPLIT_NAMES.get(str(name))
        if role is not None and role not in splits:
            splits[role] = split
    if "train" not in splits:
        raise ValueError(
            f"The data set has the splits {', '.join(map(str, found))}: expected one called 'train'."
        )
    return splits


def data_folder(source: Source) -> Path:
    """Return the folder that names of files in a source's columns are relative to."""
    path = Path(source).expanduser() if isinstance(source, str | Path) else Path()
    return path.parent if path.suffix in _FORMATS else path if path.is_dir() else Path()


def _from_path(source: str, subset: str | None) -> Mapping[str, Dataset]:
    path = Path(source).expanduser()
    looks_local = path.exists() or path.suffix in _FORMATS or source.startswith((".", "/", "~"))
    if not looks_local:
        return _from_hub(source, subset)
    if subset is not None:
        raise ValueError(f"subset={subset!r} is for hub data sets, but {source!r} is a local path.")
    if path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _FORMATS}
        if not files and not any(file.is_file() for file in path.rglob("*")):
            raise ValueError(
                f"The folder {source} holds no {', '.join(_FORMATS)} file, and no folders of images or "
                "recordings."
            )
        if not files and (recordings := _recordings(path)):
            return recordings
        if not files:
            images: Mapping[str, Dataset] = _read(
                path, lambda: datasets.load_dataset("imagefolder", data_dir=str(path))
            )
            return images
        return {name: _read_file(file) for name, file in files.items()}
    if not path.is_file():
        raise ValueError(f"There is no data set file {source}.")
    check_choice("data set suffix", _FORMATS, path.suffix)
    return {"train": _read_file(path)}


def _recordings(path: Path) -> dict[str, Dataset]:
    """Return names of recordings and of their folders, by split; datasets' own reader needs torchcodec."""
    splits = {place.name: place for place in path.iterdir() if place.name in _SPLIT_NAMES}
    files = {
        name: sorted(file for file in place.rglob("*") if file.suffix.lower() in _RECORDINGS)
        for name, place in (splits or {"train": path}).items()
    }
    return {
        name: Dataset.from_dict(
            {"audio": [str(file.absolute()) for file in own], "label": [file.parent.name for file in own]}
        )
        for name, own in files.items()
        if own
    }


def _read_file(path: Path) -> Dataset:
    readers: Mapping[str, Callable[[str], Dataset]] = {
        "csv": _from_csv,
        "json": partial(Dataset.from_json, keep_in_memory=True),
        "parquet": partial(Dataset.from_parquet, keep_in_memory=True),
    }
    return _read(path, lambda: readers[_FORMATS[path.suffix]](str(path)))


def _from_csv(path: str) -> Dataset:
    # datasets reads a file in parts, each with types of its own: what is True, False and Neither in one is
    # Boolean, "true" and "false", in another.
    table = pandas.read_csv(path, sep="\t" if path.endswith(".tsv") else ",", low_memory=False)
    return Dataset.from_pandas(table, preserve_index=False)


def _read(path: Path, reader: Callable[[], Any]) -> Any:
    """Return what a reader reads of a path, without a progress bar; raise a ValueError where it cannot."""
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return reader()
    except StopIteration as error:  # of an empty file of JSON lines
        raise ValueError(f"Cannot read {path}: there are no rows in it.") from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"Cannot read {path}: {error}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _from_hub(name: str, subset: str | None) -> Mapping[str, Dataset]:
    try:
        loaded = datasets.load_dataset(name, subset)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        where = name if subset is None else f"{name}/{subset}"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"Cannot load the data set {where!r}: it is no local path, and the hub gave: {first}"
        ) from error
    splits: Mapping[str, Dataset] = loaded
    return splits
