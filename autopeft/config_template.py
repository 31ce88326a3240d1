"""The first YAML of a search: the task that a data set's columns are for, and the settings there are.

Columns are told apart by their types and by how many values they have; the task says whether it was right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from datasets import ClassLabel, Dataset, Value

from autopeft.core.errors import check_choice
from autopeft.models.backbone import Backbone
from autopeft.models.processors import load_processor
from autopeft.tasks import TASKS, CausalLM, PreferenceOptimization
from autopeft.tasks.dataset_loading import TEXT, load_splits
from autopeft.tasks.dataset_task import ColumnKind, DatasetTask
from autopeft.tasks.language_rows import LAYOUTS, layout_of

_TASKS = [task for task in TASKS if issubclass(task, DatasetTask)]
_MOST_CLASSES = 0.2
"""Different values in a column of classes at most, as a share of its rows."""
_CLASSES_OF_FEW_ROWS = 10
"""A small file may have up to so many classes, if each has two rows on average."""
_CLASSES_OF_WHOLE_NUMBERS = 20
"""Whole numbers of more values are numbers, such as scores up to 100; unless their column is "label"."""
_ROWS_READ = 1000  # to tell whether a column has texts
_ASIDE = {"id", "idx", "index", "uuid", "split", "fold", "date", "datetime", "timestamp", "url"}
"""Words in the names of columns that are neither read nor predicted unless they are asked for."""
_PAIRS = (
    {"sentence1", "sentence2"},
    {"premise", "hypothesis"},
    {"claim", "evidence"},
    {"question", "passage"},
    {"question", "context"},
    {"question", "sentence"},
    {"question", "answer"},
    {"question1", "question2"},
    {"query", "passage"},
    {"query", "document"},
    {"text1", "text2"},
    {"text_a", "text_b"},
)
"""Names of two columns that are read together."""

Columns = tuple[str, ...]
"""What a setting names: a column, or the two of a pair of texts."""
Choose = Callable[[str, Sequence[str]], Columns]
"""Returns which of several columns a setting is to name."""

_TEMPLATE = """\
# Next:
#   autopeft validate {to}   # whether all is well, and what would be searched
#   autopeft search {to}     # Ctrl-C keeps what is done, the same command resumes
{backbone}
# The data have {columns}.
{task}\
  # train_examples: 2000   # fewer rows make a trial cheaper

# What to trade off. Metrics of the task: {metrics}.
objectives: [{metric}, trainable_parameters, peak_memory]

# Bounds that are checked before anything is trained:
# constraints: {{trainable_parameters: 2M, peak_memory: 12 GiB}}

# What all candidates have in common:
# training: {{epochs: 3, batch_size: 16}}

# The frozen weights in 4 bits, on a GPU and with autopeft[quantization]:
# quantization: nf4

seed: 0

# The budget: hours of each call, or trials, gpu_seconds or cpu_seconds of all calls together. The first that
# is spent ends the call.
run:
  hours: 1
"""


def write_template(
    to: Path,
    model: str,
    data: str,
    task: str | None = None,
    *,
    text: Sequence[str] = (),
    label: str | None = None,
    choose: Choose | None = None,
) -> dict[str, Any]:
    """Write the settings of a search to a new YAML file, and return those of its task.

    Args:
        to: The file.
        model: Hub name, or a folder.
        data: Hub name, file or folder; see `DatasetTask`.
        task: Name of the task's class; None to recognise it by the columns.
        text: The column of texts, or the two of pairs; none to recognise it.
        label: The column to predict; None to recognise it.
        choose: Asked where several columns may be meant; without it that is an error.

    Raises:
        ValueError: Model, data and task are not valid or do not go together, or the file cannot be written.
    """
    if to.exists():
        raise ValueError(f"{to} is there already: name another file with --to.")
    found, columns, held = recognise(data, task, text=text, label=label, choose=choose)
    found.validate()
    Backbone.without_weights(model, found.head, dtype=torch.float32)  # raises where it is not for the task
    if isinstance(found, CausalLM | PreferenceOptimization):
        tokenizer: Any = load_processor(model, found.head.processor_class)
        found.reader(tokenizer)  # raises where chats need a template
    settings = {"type": type(found).__name__, "dataset": data, **columns}
    text = _TEMPLATE.format(
        to=to,
        backbone=_as_yaml({"backbone": model}),
        columns=held,
        task=_as_yaml({"task": settings}),
        metrics=", ".join(metric.name for metric in found.metrics),
        metric=found.metrics[0].name,
    )
    try:
        to.write_text(text)
    except OSError as error:
        raise ValueError(f"{to} cannot be written: {error.strerror}.") from error
    return settings


def recognise(
    data: str,
    task: str | None = None,
    *,
    text: Sequence[str] = (),
    label: str | None = None,
    choose: Choose | None = None,
) -> tuple[DatasetTask, dict[str, Any], str]:
    """Return the task that data are for, its settings that name columns, and what each column holds.

    The arguments are those of `write_template`; the data are not checked but by their columns.

    Raises:
        ValueError: The data cannot be read, no task was recognised by them, or several columns may be meant.
    """
    by_name = {made.__name__: made for made in _TASKS}
    if task is not None:
        check_choice("task", by_name, task)
    train = load_splits(data, None)["train"]
    if len(train.column_names) == 1:
        _check_separator(train.column_names[0])
    given: Mapping[str, Columns] = {"text": tuple(text), "label": () if label is None else (label,)}
    named = {setting: columns for setting, columns in given.items() if columns}
    check_choice("column", train.column_names, *chain(*named.values()))
    kinds = {column: _kind(train, column) for column in train.column_names}
    likely = _likely(kinds, is_labelled="label" in named) if task is None else (by_name[task],)
    ways = {made: _fitting(train, kinds, made, named, is_named=task is not None) for made in likely}
    ways = {
        made: fitting for made, fitting in ways.items() if fitting.keys() == made.needs.keys() >= named.keys()
    }
    if not ways:
        raise _not_recognised(kinds, None if task is None else by_name[task], named)
    made, chosen = next(iter(ways)), dict[str, Columns]()
    if "label" in made.needs:  # one of another task's may be meant
        labels = dict.fromkeys(columns for fitting in ways.values() for columns in fitting.get("label", []))
        predicted = _one("label", [*labels], choose)
        made = next(made for made, fitting in ways.items() if predicted in fitting.get("label", []))
        ways[made]["label"] = [predicted]
    for setting in [*made.needs][::-1]:  # what is read is not what is predicted
        free = [columns for columns in ways[made][setting] if columns not in chosen.values()]
        chosen[setting] = _one(setting, free, choose)
    settings: dict[str, Any] = {
        name: [*chosen[name]] if len(chosen[name]) > 1 else chosen[name][0] for name in made.needs
    }
    return made(data, **settings), settings, _listed(kinds)


def _check_separator(column: str) -> None:
    """Raise ValueError where the name of a file's only column looks like several."""
    for mark, name in {";": "';'", "\t": "tabs"}.items():
        if mark in column:
            raise ValueError(
                f"The file seems to be separated by {name}: its only column is {column!r}. "
                "Save it with commas."
            )


def _one(setting: str, columns: Sequence[Columns], choose: Choose | None) -> Columns:
    """Return the only columns that a setting may name, or those that are chosen.

    Raises:
        ValueError: There are several, and nobody to choose; or what was chosen is none of them.
    """
    if len(columns) == 1:
        return columns[0]
    names = [*dict.fromkeys(chain(*columns))]
    if choose is None:
        how = {"text": "with --text (two of them for pairs)", "label": "with --label"}
        raise ValueError(
            f"Several columns may be the {setting}: {', '.join(map(repr, names))}. Say which "
            f"{how.get(setting, f'by the name {setting!r}')}."
        )
    chosen = choose(setting, names)
    check_choice(setting, names, *chosen)
    return chosen


def _not_recognised(
    kinds: Mapping[str, ColumnKind], task: type[DatasetTask] | None, named: Mapping[str, Columns]
) -> ValueError:
    if task is None:
        return ValueError(
            f"No task was recognised by the columns {_listed(kinds)}: name what is read and predicted with "
            f"--text and --label, for a language model name columns {LAYOUTS}, or name the task with --task "
            f"({', '.join(made.__name__ for made in _TASKS)})."
        )
    foreign = [setting for setting in named if setting not in task.needs]
    if foreign:
        return ValueError(f"{task.__name__} has no {foreign[0]!r}: leave out --{foreign[0]}.")
    needed = " and ".join(f"{setting!r} ({kind})" for setting, kind in task.needs.items())
    mend = "rename columns, or name another task."
    if {*task.needs} == {"text", "label"} and len(kinds) > 1:  # which options name
        names = {setting: columns[0] for setting, columns in named.items()}
        free = [column for column in kinds if column not in names.values() and not _is_aside(column)]
        texts = [column for column in free if kinds[column] == "text"] or free
        text = names.get("text") or next(iter(texts), "COLUMN")
        label = names.get("label") or next((column for column in free if column != text), "COLUMN")
        mend = f"name them, as in --text {text} --label {label}, or name another task."
    return ValueError(f"{task.__name__} needs columns {needed}, and the data have {_listed(kinds)}: {mend}")


def _as_yaml(settings: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _listed(kinds: Mapping[str, ColumnKind]) -> str:
    return ", ".join(f"{column!r} ({kind})" for column, kind in kinds.items())


def _kind(train: Dataset, column: str) -> ColumnKind:
    """Return what a column holds."""
    feature = train.features[column]
    is_text = getattr(feature, "dtype", None) in TEXT
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.Audio) or (column == "audio" and (is_text or isinstance(feature, dict))):
        return "recording"
    if isinstance(feature, datasets.List):
        return "list"
    if not isinstance(feature, ClassLabel | Value):
        return "other"
    values = [value for value in train.unique(column) if value is not None and value == value]
    if any(isinstance(value, float) and value != int(value) for value in values):
        return "number"
    are_numbers = not isinstance(feature, ClassLabel) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    most = max(_MOST_CLASSES * len(train), min(_CLASSES_OF_FEW_ROWS, len(train) / 2))
    if are_numbers:
        most = min(most, _CLASSES_OF_WHOLE_NUMBERS)
    if column == "label" or 2 <= len(values) <= most:
        return "class"
    if are_numbers and len(values) > 1 and not _count_rows(values, len(train)):
        return "number"
    return "text" if is_text else "other"


def _count_rows(values: Sequence[float], rows: int) -> bool:
    """Whether whole numbers are one a row, without a gap."""
    return len(values) == rows == max(values) - min(values) + 1


def _likely(kinds: Mapping[str, ColumnKind], *, is_labelled: bool) -> list[type[DatasetTask]]:
    """Return the tasks that may be meant, the likeliest first; whether a label was named."""
    try:
        layout = layout_of(tuple(kinds))
    except ValueError:
        layout = None
    others = [made for made in _TASKS if made is not CausalLM and made.recognised_by <= kinds.keys()]
    is_labelled |= layout == "question/answer" and "label" in kinds  # whether answers are right, perhaps
    if layout not in (None, "text") and not is_labelled:  # else messages could be taken for tags
        others = [made for made in others if made.recognised_by]
    return others if layout is None else [*others, CausalLM]


def _fitting(
    train: Dataset,
    kinds: Mapping[str, ColumnKind],
    made: type[DatasetTask],
    named: Mapping[str, Columns],
    *,
    is_named: bool,
) -> dict[str, list[Columns]]:
    """Return which columns each setting of a task may name; a setting without one is left out.

    What was `named` fits a task that was named too; else it must hold what the task needs.
    """
    found: dict[str, list[Columns]] = {}
    taken = [*chain(*named.values())]
    for setting, needed in made.needs.items():
        fits = {name for name, kind in kinds.items() if kind == needed}
        default = getattr(made, setting)
        if needed == "text":  # of which there may be few that differ
            fits |= {name for name in (default, *taken) if kinds.get(name) == "class"}
        if setting in named:
            found[setting] = [named[setting]] if is_named or fits.issuperset(named[setting]) else []
        elif default in kinds:
            found[setting] = [(default,)] if default in fits and default not in taken else []
        else:
            free = [name for name in kinds if name in fits and name not in taken and not _is_aside(name)]
            found[setting] = _texts(train, free) if needed == "text" else [(name,) for name in free]
        if len(found[setting]) == 1:
            taken += found[setting][0]
    return {setting: columns for setting, columns in found.items() if columns}


def _texts(train: Dataset, names: Sequence[str]) -> list[Columns]:
    """Return the pair that names tell, or the columns of words with spaces between; all where none has."""
    pairs = [pair for pair in _PAIRS if pair <= {name.lower() for name in names}]
    if len(pairs) == 1:
        return [tuple(name for name in names if name.lower() in pairs[0])]
    words = re.compile(r"[^\W\d_]\w*\s+\S")
    found = {name: [bool(words.search(text)) for text in train[name][:_ROWS_READ] if text] for name in names}
    spaced = [name for name, are_words in found.items() if 2 * sum(are_words) > len(are_words)]
    return [(name,) for name in spaced or names]


def _is_aside(name: str) -> bool:
    return not _ASIDE.isdisjoint(re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
