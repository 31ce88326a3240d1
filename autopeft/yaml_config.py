"""Read a search from YAML: the same classes as in Python, with every name checked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from autopeft.core.errors import unknown_choice
from autopeft.evaluation.supernet.settings import WarmStart
from autopeft.optimization.budget import Budget
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.search import Search
from autopeft.search_spaces import AutoPEFTPaper, PerLayer, ScoreGuided, Uniform
from autopeft.tasks import TextClassification
from autopeft.training.settings import Training

_TASKS: Mapping[str, type[Any]] = {"TextClassification": TextClassification}
_SPACES: Mapping[str, type[Any]] = {
    "PerLayer": PerLayer,
    "ScoreGuided": ScoreGuided,
    "Uniform": Uniform,
    "AutoPEFTPaper": AutoPEFTPaper,
}
_NOT_IN_YAML = ("tokenizer", "site_scores")  # objects
_RUN_KEYS = ("trials", "hours", "gpu_seconds", "cpu_seconds")
# Arguments that take a loaded object, or that a search fills in: YAML has nothing to give them.
_ONLY_IN_PYTHON = frozenset({"tokenizer", "site_scores"})
_WORDS: Mapping[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    Any: ("any value", "any values"),
    NoneType: ("null", "nulls"),
}


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A search read from YAML.

    Attributes:
        search: The search.
        run: Its budget: arguments of `Search.run`.
        settings: The settings as read, overrides included.
    """

    search: Search
    run: Mapping[str, Any]
    settings: Mapping[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Read a search from a YAML file.

    Args:
        path: The file. Paths in it are relative to the working directory.
        overrides: Changes such as "training.epochs=5" or "space.ranks=[1, 8]"; values are YAML.

    Raises:
        ValueError: The file cannot be read, or a key or value is not valid; the message names the
            nearest valid one.
    """
    path = Path(path)
    try:
        settings = _read_yaml(path.read_text())
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, expected a mapping of settings.")
    for override in overrides:
        _apply(settings, override)
    return build_config(settings)


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number; YAML 1.1 wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def build_config(settings: Mapping[str, Any]) -> SearchConfig:
    """Make a search from settings; see `load_config`."""
    rest = dict(settings)
    run = rest.pop("run", None) or {}
    if not isinstance(run, Mapping):
        raise ValueError(f"'run' is a mapping with a budget such as trials: 50, got {run!r}.")
    for key in run:
        if key not in _RUN_KEYS:
            raise unknown_choice("key of 'run'", str(key), _RUN_KEYS)
    for required in ("backbone", "task", "space"):
        if required not in rest:
            raise ValueError(f"The settings need {required!r}; they have {', '.join(map(str, rest))}.")
    rest["task"] = _choose("task", rest["task"], _TASKS)
    rest["space"] = _choose("space", rest["space"], _SPACES)
    if rest.get("training") is not None:
        rest["training"] = _build(Training, rest["training"], "training")
    if rest.get("fidelity") is not None:
        rest["fidelity"] = _build(SuccessiveHalving, rest["fidelity"], "fidelity")
    if rest.get("warm_start") is not None:
        rest["warm_start"] = _build(WarmStart, rest["warm_start"], "warm_start")
    if run:
        try:
            Budget(**run)  # what is wrong with a budget shows before anything is loaded
        except ValueError as error:
            raise ValueError(f"'run': {error}") from error
    search: Search = _build(Search, rest)
    return SearchConfig(search=search, run=run, settings=settings)


def _choose(what: str, given: Any, choices: Mapping[str, type[Any]]) -> Any:
    """Make the object whose class stands under "type"; one choice alone needs no "type"."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what!r} is a mapping with a 'type', got {given!r}.")
    rest = dict(given)
    name = rest.pop("type", next(iter(choices)) if len(choices) == 1 else None)
    if name is None:
        raise ValueError(f"{what!r} needs a 'type': one of {', '.join(choices)}.")
    if not isinstance(name, str) or name not in choices:
        raise unknown_choice(f"{what} type", str(name), choices)
    return _build(choices[name], rest, what)


def _build(make: type[Any], given: Any, section: str = "") -> Any:
    """Make an object of a section's settings, once each has a type that the class's arguments have."""
    where = repr(section) if section else "the settings"
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is a mapping, got {given!r}.")
    parameters = inspect.signature(make).parameters
    known = {key: one for key, one in parameters.items() if key not in _ONLY_IN_PYTHON}
    for key in given:
        if key not in known:
            raise unknown_choice(f"key of {where}", str(key), known)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{where} needs {key!r}; it has {', '.join(given) or 'nothing'}.")
    # Of a data class also the fields that another module's class gives it.
    hints = get_type_hints(make if is_dataclass(make) else make.__init__)
    values = {key: _tuples(value) for key, value in given.items()}
    for key, value in values.items():
        _check(f"{section}.{key}" if section else key, value, hints[key])
    return make(**values)


def _check(key: str, value: Any, expected: Any) -> None:
    """Raise where a value has none of the types of an annotation; in a mapping, name the wrong item."""
    kinds = _alternatives(expected)
    if any(_fits(value, kind) for kind in kinds):
        return
    named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    for kind in kinds if named else ():
        if get_origin(kind) is Mapping and _words(kind):
            for name, one in value.items():
                _check(f"{key}.{name}", one, get_args(kind)[1])
    words = dict.fromkeys(filter(None, map(_words, kinds)))
    raise ValueError(f"{key} is {' or '.join(words)}, got {_as_given(value)!r}.")


def _alternatives(expected: Any) -> tuple[Any, ...]:
    return get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has one type of an annotation.

    One text may stand for a sequence of one, a whole number for a number. Which texts a Literal takes
    is left to the class: it names the nearest.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str)
    if origin is Mapping:
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(_is_one_of(name, parts[0]) and _is_one_of(one, parts[1]) for name, one in items)
    if origin is Sequence:
        several = (value,) if isinstance(value, str) else value
        return isinstance(several, tuple) and all(_is_one_of(one, parts[0]) for one in several)
    if origin is tuple:
        same = isinstance(value, tuple) and len(value) == len(parts)
        return same and all(map(_is_one_of, value, parts))
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_one_of(value: Any, expected: Any) -> bool:
    return any(_fits(value, kind) for kind in _alternatives(expected))


def _words(kind: Any, several: bool = False) -> str:
    """Say what a type looks like in YAML; nothing for one that cannot be written there."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        return f"a list of {len(parts)} {_words(parts[0], several=True)}"
    if origin in (Sequence, Mapping):
        each = [words for one in _alternatives(parts[-1]) if (words := _words(one, several=True))]
        name = "a list of" if origin is Sequence else f"{'mappings' if several else 'a mapping'} of texts to"
        return f"{name} {' or '.join(each)}" if each else ""
    return _WORDS.get(kind, ("", ""))[several]


def _as_given(value: Any) -> Any:
    """Turn tuples back into the lists that YAML had."""
    return [_as_given(one) for one in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    """Turn YAML's lists into tuples, so that settings compare equal to the ones written in Python."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value


def _apply(settings: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ValueError(f"An override reads key=value, as in training.epochs=5; got {override!r}.")
    *parents, last = name.split(".")
    place = settings
    for parent in parents:
        if place.get(parent) is None:  # also what YAML makes of a key with nothing behind it
            place[parent] = {}
        if not isinstance(place[parent], dict):
            raise ValueError(f"{override!r}: {parent!r} holds {place[parent]!r}, not further keys.")
        place = place[parent]
    try:
        place[last] = _read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not valid YAML: {error}") from error
