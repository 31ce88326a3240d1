"""A search's settings as a YAML document, of which the same search can be made again.

The tables say what YAML can express; `yaml_config` reads by them what is written here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from autopeft.core.atomic_files import replacing
from autopeft.evaluation.packing.executor import PackedExecutor
from autopeft.evaluation.ray_executor import RayExecutor
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.search_identity import import_path
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, SearchSpace, Uniform
from autopeft.search_spaces.presets import PRESETS
from autopeft.tasks import TASKS, Task
from autopeft.training.settings import Training

TYPES: Mapping[str, tuple[type[Any], ...]] = {
    "task": TASKS,
    "space": (PerLayer, ScoreGuided, Uniform, AutoPEFTPaper, *PRESETS),
    "executor": (PackedExecutor, RayExecutor),
}
"""Sections whose class stands under "type"."""
BASES: Mapping[str, type[Any]] = {"task": Task, "space": SearchSpace, "executor": object}
"""What a class of a user's own derives from, which stands there by its import path."""
SECTIONS: Mapping[str, type[Any]] = {"training": Training, "halving": SuccessiveHalving}
"""Sections of one class each."""
ONLY_IN_PYTHON = frozenset({"tokenizer", "site_scores", "callbacks"})
"""Arguments that take a loaded object, or that a search fills in: YAML has nothing to give them."""
LOST = "only_in_python"
"""Key of what a document cannot express: by setting, what was given."""
_FILLED_IN = "site_scores"


def save_document(path: Path, arguments: Mapping[str, Any]) -> None:
    """Write the arguments of a search as YAML; what it cannot express stands below `LOST`, by import path.

    A task or a space of a user's own is written where it is a data class that can be imported.

    Raises:
        OSError: See `replacing`.
    """
    lost: dict[str, str] = {}
    document = {name: _plain(value, name, lost) for name, value in arguments.items()}
    kept = {
        name: value for name, value in document.items() if name not in lost and name not in ONLY_IN_PYTHON
    }
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(kept | ({LOST: lost} if lost else {}), sort_keys=False))


def _plain(value: Any, name: str, lost: dict[str, str]) -> Any:
    """Return a value as YAML has it; None, and a note in `lost`, where it has no way to say it."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # of which there are subclasses, as of numpy, that YAML does not know
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(part, name, lost) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{name}.{key}", lost) for key, part in value.items()}
    if type(value) in TYPES.get(name, ()):
        return {"type": type(value).__name__, **_fields(value, name, lost)}
    if name in BASES and dataclasses.is_dataclass(value) and _is_importable(type(value)):
        return {"type": f"{type(value).__module__}:{type(value).__name__}", **_fields(value, name, lost)}
    if type(value) is SECTIONS.get(name):
        return _fields(value, name, lost)
    lost[name] = import_path(value)
    return None


def _is_importable(made: type[Any]) -> bool:
    """Whether a class is found under its name in a module other than the script that was run."""
    module = sys.modules.get(made.__module__)
    return made.__module__ != "__main__" and getattr(module, made.__name__, None) is made


def _fields(section: Any, name: str, lost: dict[str, str]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(section) if field.init and field.name != _FILLED_IN]
    plain = {each: _plain(getattr(section, each), f"{name}.{each}", lost) for each in names}
    return {each: value for each, value in plain.items() if each not in ONLY_IN_PYTHON}
