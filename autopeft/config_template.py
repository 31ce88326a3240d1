"""The first YAML of a search: the task that a data set's columns are for, and the settings there are.

Columns are told apart by their types and by how many values they have; the task says whether it was right.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from datasets import ClassLabel, Dataset, Value

from autopeft.core.errors import unknown_choice
from autopeft.models.backbone import Backbone
from autopeft.models.processors import load_processor
from autopeft.tasks import TASKS, CausalLM, PreferenceOptimization
from autopeft.tasks.dataset_loading import TEXT, load_splits
from autopeft.tasks.dataset_task import ColumnKind, DatasetTask
from autopeft.tasks.language_rows import LAYOUTS, layout_of

_TASKS = [task for task in TASKS if issubclass(task, DatasetTask)]
_MOST_CLASSES = 0.2
"""Different values in a column of classes, as a share of its rows."""

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

# The budget: trials, hours, gpu_seconds or cpu_seconds. The first that is spent ends the search.
run:
  trials: 30
"""


def write_template(to: Path, model: str, data: str, task: str | None = None) -> dict[str, Any]:
    """Write the settings of a search to a new YAML file, and return those of its task.

    Args:
        to: The file.
        model: Hub name, or a folder.
        data: Hub name, file or folder; see `DatasetTask`.
        task: Name of the task's class; None to recognise it by the columns.

    Raises:
        ValueError: Model, data and task are not valid or do not go together, or the file cannot be written.
    """
    if to.exists():
        raise ValueError(f"{to} is there already: name another file with --to.")
    found, columns, held = recognise(data, task)
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


def recognise(data: str, task: str | None = None) -> tuple[DatasetTask, dict[str, Any], str]:
    """Return the task that data are for, its settings that name columns, and what each column holds.

    The arguments are those of `write_template`; the data are not checked but by their columns.

    Raises:
        ValueError: The data cannot be read, or no task was recognised by them.
    """
    by_name = {made.__name__: made for made in _TASKS}
    if task is not None and task not in by_name:
        raise unknown_choice("task", task, by_name)
    train = load_splits(data, None)["train"]
    kinds = {column: _kind(train, column) for column in train.column_names}
    for made in _likely(kinds) if task is None else (by_name[task],):
        columns = _columns(train, kinds, made)
        if columns.keys() == made.needs.keys():
            return made(data, **columns), columns, _listed(kinds)
    if task is None:
        raise ValueError(
            f"No task was recognised by the columns {_listed(kinds)}: call what is to be predicted 'label', "
            f"for a language model name columns {LAYOUTS}, or name the task with --task "
            f"({', '.join(by_name)})."
        )
    needed = " and ".join(f"{setting!r} ({kind})" for setting, kind in by_name[task].needs.items())
    raise ValueError(
        f"{task} needs columns {needed}, and the data have {_listed(kinds)}: rename columns, or name another "
        "task."
    )


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
    if column == "label" or 2 <= len(values) <= _MOST_CLASSES * len(train):
        return "class"
    return "text" if is_text else "other"


def _likely(kinds: Mapping[str, ColumnKind]) -> list[type[DatasetTask]]:
    """Return the tasks that may be meant, the likeliest first."""
    try:
        layout = layout_of(tuple(kinds))
    except ValueError:
        layout = None
    others = [made for made in _TASKS if made is not CausalLM and made.recognised_by <= kinds.keys()]
    is_labelled = layout == "question/answer" and "label" in kinds  # whether answers are right, perhaps
    if layout not in (None, "text") and not is_labelled:  # else messages could be taken for tags
        others = [made for made in others if made.recognised_by]
    return others if layout is None else [*others, CausalLM]


def _columns(train: Dataset, kinds: Mapping[str, ColumnKind], made: type[DatasetTask]) -> dict[str, Any]:
    """Return the settings of a task that name columns, those alone that a column was found for."""
    found: dict[str, Any] = {}
    for setting, needed in made.needs.items():
        default = getattr(made, setting)
        fitting = [name for name, kind in kinds.items() if kind == needed and name not in found.values()]
        if default in kinds:
            is_short = needed == "text" and kinds[default] == "class"  # texts, of which there are few
            fitting = [default] if default in fitting or is_short else []
        if not fitting:
            continue
        if needed == "class":  # a kind of few values rather than one of many
            found[setting] = min(fitting, key=lambda name: len(train.unique(name)))
        elif needed == "text" and setting == "text" and len(fitting) == 2:
            found[setting] = fitting
        elif needed == "text":
            found[setting] = max(fitting, key=lambda name: sum(map(len, filter(None, train[name][:]))))
        else:
            found[setting] = fitting[0]
    return found
