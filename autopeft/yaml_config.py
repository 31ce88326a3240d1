"""Read a search from YAML: the same classes as in Python, every key and value checked by pydantic."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from autopeft.core.documents import parse_yaml
from autopeft.core.entry_points import load_entry_point
from autopeft.core.errors import check_choice, unknown_choice
from autopeft.optimization.budget import Budget
from autopeft.search import Search
from autopeft.search_document import BASES, LOST, ONLY_IN_PYTHON, SECTIONS, TYPES

_RUN_KEYS = ("trials", "hours", "gpu_seconds", "cpu_seconds", "verdict", "retry_failed")

_PLAIN = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid dictionary": "a mapping",
    "a valid tuple": "a list",
    "an instance of Sequence": "a list",
}
"""What pydantic calls a kind of value, and what YAML's users call it."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A search read from YAML.

    Attributes:
        search: The search.
        run: Its budget, and whether failed trials are tried again: arguments of `Search.run`.
    """

    search: Search
    run: Mapping[str, Any]


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a search from a YAML file.

    Args:
        path: The file. Paths in it are relative to the working directory.
        overrides: Changes such as "training.epochs=5" or "space.sizes.rank=[1, 8]"; values are YAML.

    Raises:
        ValueError: The file cannot be read, or a key or value is not valid; the message names the
            nearest valid one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {path}: {getattr(error, 'strerror', error)}.") from error
    settings = parse_yaml(text, str(path), _Loader)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, expected a mapping of settings.")
    for override in overrides:
        _apply(settings, override)
    return build_config(settings)


def build_config(settings: Mapping[str, Any]) -> SearchConfig:
    """Make a search from settings; see `load_config`."""
    arguments = dict(settings)
    if lost := arguments.pop(LOST, {}):
        parts = ", ".join(f"{name} ({given})" for name, given in lost.items())
        raise ValueError(
            f"The search was launched from Python with objects that a file cannot hold: {parts}. Make it "
            "again there with the same objects: search.export(number, folder) writes its adapters."
        )
    run = _checked_run(arguments.pop("run", None) or {})
    for section, types in TYPES.items():
        if arguments.get(section) not in (None, "local"):
            arguments[section] = _choose(section, arguments[section], {made.__name__: made for made in types})
    for section, settings_class in SECTIONS.items():
        if arguments.get(section) is not None:
            arguments[section] = _build(settings_class, arguments[section], section)
    return SearchConfig(search=_build(Search, arguments), run=run)


def _checked_run(run: Any) -> Mapping[str, Any]:
    """Return the arguments of `Search.run`: what is wrong with them shows before anything is loaded."""
    if not isinstance(run, Mapping):
        raise ValueError(f"'run' is a mapping with a budget such as trials: 50, got {run!r}.")
    for key in run:
        if key not in _RUN_KEYS:
            raise _unknown_key("run", str(key), _RUN_KEYS)
    bounds = dict(run)
    retry_failed, verdict = bounds.pop("retry_failed", False), bounds.pop("verdict", 0.0)
    if not isinstance(retry_failed, bool):
        raise ValueError(f"run.retry_failed should be true or false, got {retry_failed!r}.")
    if run:
        try:
            Budget(**bounds).less(verdict)
        except ValueError as error:
            raise ValueError(f"'run': {error}") from error
    return run


def _choose(section: str, given: Any, choices: Mapping[str, type[Any]]) -> Any:
    """Make the object whose class stands under "type"; one choice alone needs no "type"."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{section!r} is a mapping with a 'type', got {given!r}.")
    arguments = dict(given)
    name = arguments.pop("type", next(iter(choices)) if len(choices) == 1 else None)
    if name is None:
        raise ValueError(
            f"{section!r} needs a 'type': one of {', '.join(choices)}, or an import path as in "
            f"'my_module:My{section.title()}'."
        )
    if isinstance(name, str) and re.search(r"\w[.:]\w", name):
        return _build(_imported(section, name), arguments, section)
    made = choices.get(str(name)) or load_entry_point(f"{section}s", str(name))
    if made is None:
        raise unknown_choice(f"{section} type", str(name), choices)
    return _build(made, arguments, section)


def _imported(section: str, path: str) -> type[Any]:
    """Return a user's own class by its import path, with a colon or a point before its name."""
    where, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = vars(importlib.import_module(where))
    except Exception as error:  # whatever the user's module does
        raise ValueError(
            f"{section} type {path!r}: importing {where!r} failed with {type(error).__name__}: {error}. "
            "Modules are looked for where Python finds them, by the command `autopeft` also in the working "
            "directory."
        ) from error
    base = BASES[section]
    classes = {key: made for key, made in found.items() if isinstance(made, type) and made is not base}
    own = {key: made for key, made in classes.items() if issubclass(made, base)}
    check_choice(f"{base.__name__} in {where}", sorted(own), name)
    return own[name]


def _build(made: type[Any], given: Any, section: str = "") -> Any:
    """Make an object from a section's settings, checked against the types of the class's arguments."""
    where = repr(section) if section else "the settings"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is a mapping, got {given!r}.")
    schema = _schema(made)
    for key in given:
        if key not in schema.model_fields:
            raise _unknown_key(section, str(key), [*schema.model_fields])
    values = {key: _as_argument(value, schema.model_fields[key].annotation) for key, value in given.items()}
    try:
        schema(**values)
    except ValidationError as error:
        raise ValueError(_explain(error, section, given)) from error
    try:
        return made(**values)
    except TypeError as error:  # such as a method that a class of the user's own lacks
        raise ValueError(f"{where}: {error}.") from error


def _unknown_key(section: str, key: str, valid: Sequence[str]) -> ValueError:
    """Return the error for a key that a section does not have; it says where else the key belongs."""
    where = repr(section) if section else "the settings"
    classes = {"": (Search,), **{name: (made,) for name, made in SECTIONS.items()}, **TYPES}
    homes = [
        name
        for name, types in classes.items()
        if name != section and any(key in _schema(made).model_fields for made in types)
    ]
    homes += ["run"] * (key in _RUN_KEYS)
    is_slip = get_close_matches(key, valid, cutoff=0.85)  # "size" for "sizes", where executors have a "size"
    if homes and not is_slip:
        places = " or ".join(f"{name}.{key}" if name else key for name in homes)
        return ValueError(f"Unknown key of {where} {key!r}: set it as {places}.")
    return unknown_choice(f"key of {where}", key, valid)


def _schema(made: type[Any]) -> type[BaseModel]:
    """Return a pydantic model with the arguments of a class, for their types alone."""
    # Of a data class also the fields that another module's class gives it.
    try:
        hints = get_type_hints(made if is_dataclass(made) else made.__init__)
    except NameError as error:
        raise ValueError(f"The types of {made.__name__}'s arguments cannot be read: {error}.") from error
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(made).parameters.items()
        if name not in ONLY_IN_PYTHON
    }
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(made.__name__, __config__=strict, **fields)


def _as_argument(value: Any, expected: Any) -> Any:
    """Turn YAML's lists into tuples, and one text into a sequence of one where a sequence is expected."""
    if isinstance(value, Mapping):
        return {key: _as_argument(part, Any) for key, part in value.items()}
    if isinstance(value, list):
        return tuple(_as_argument(part, Any) for part in value)
    kinds = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    takes_sequence = any(get_origin(kind) is Sequence for kind in kinds)
    if isinstance(value, str) and str not in kinds and (takes_sequence or Path in kinds):
        return (value,) if takes_sequence else Path(value)
    return value


def _explain(error: ValidationError, section: str, given: Mapping[str, Any]) -> str:
    """Say which setting is wrong, what was expected and what was given."""
    problems = error.errors(include_url=False)
    key = str(problems[0]["loc"][0])
    if problems[0]["type"] == "missing":
        where = f"{section!r} needs" if section else "The settings need"
        return f"{where} {key!r}; given: {', '.join(map(str, given)) or 'nothing'}."
    name, value = f"{section}.{key}" if section else key, given[key]
    of_key = [problem for problem in problems if problem["loc"][0] == key]
    # YAML gives no instances of classes such as a loaded model.
    of_key = [problem for problem in of_key if problem["type"] != "is_instance_of"] or of_key
    for part in of_key[-1]["loc"][1:]:  # into mappings; pydantic also names the alternatives of a union here
        if isinstance(part, str) and isinstance(value, Mapping) and part in value:
            name, value = f"{name}.{part}", value[part]
    messages = (str(problem["msg"]).removeprefix("Input should be ") for problem in of_key)
    words = dict.fromkeys(_PLAIN.get(message, message) for message in messages)
    return f"{name} should be {' or '.join(words)}, got {value!r}."


def _apply(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"An override reads key=value, as in training.epochs=5; got {override!r}.")
    *parents, last = name.split(".")
    place = settings
    for parent in parents:
        # None is what YAML makes of a key with nothing behind it; "local" is an executor without keys.
        if place.get(parent) in (None, "local"):
            place[parent] = {}
        if not isinstance(place[parent], dict):
            raise ValueError(f"{override!r}: {parent!r} holds {place[parent]!r}, not further keys.")
        place = place[parent]
    place[last] = parse_yaml(text, f"{override!r}: the value", _Loader)
