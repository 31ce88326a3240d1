"""What the source imports: no private name of another package, no circle; and how large the house is.

import-linter holds the directions between rooms (`[tool.importlinter]` in pyproject.toml); this reads single
modules, imports for type checking included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("autopeft", "search_spaces", "callbacks")

PRIVATE: Mapping[str, str] = MappingProxyType(
    {
        "evaluation/memory/storage_tracker.py: torch._subclasses.fake_tensor.FakeTensorMode": (
            "tensors without data: peak memory is counted before training"
        ),
        "evaluation/memory/storage_tracker.py: torch.utils._python_dispatch.TorchDispatchMode": (
            "sees every operation of a step, the backward pass included"
        ),
        "evaluation/memory/storage_tracker.py: torch.ops.aten._grouped_mm": (
            "how a dispatch mode and a FLOP counter know torch.nn.functional.grouped_mm"
        ),
        "methods/prefix_tuning.py: part._attn_implementation": (
            "transformers has a public setter, and no other way to read what is to be set again"
        ),
    }
)
"""Private names of other packages that may be used, with the reason why there is no public way."""

MOST_PRIVATE = 4
MOST_ROOT_MODULES = 12
MOST_ROOMS = 12


@cache
def modules() -> Mapping[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "autopeft" else ("autopeft", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(parsed: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what is imported as (module, name in it), the name empty where the module itself is."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                yield node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""


def is_private(name: str) -> bool:
    parts = name.split(".")
    return any(part.startswith("_") and not part.startswith("__") for part in parts)


def own_names(parsed: ast.Module) -> Iterator[str]:
    """Yield the names that a module gives: of functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_of_itself(node):
            yield node.attr


def is_of_itself(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_names(parsed: ast.Module) -> set[str]:
    """Return the private names that a module imports of other packages, or reads of what it did not name.

    In `x._name` nothing says whose `x` is: what the module names itself, and what the fields of a named tuple
    are asked by, passes.
    """
    found = set()
    bound: dict[str, str] = {}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
    for module, name in imported(parsed):
        whole = f"{module}.{name}" if name else module
        if not whole.startswith("autopeft") and is_private(whole):
            found.add(whole)
    passes = {*own_names(parsed), "_asdict", "_fields", "_make", "_replace"}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in passes:
            root, point, rest = ast.unparse(node).partition(".")
            if not is_of_itself(node):
                found.add(bound.get(root, root) + point + rest)
    return found


def edges(sources: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return which modules of the package each one imports, also for type checking alone."""
    found: dict[str, set[str]] = {}
    for name, parsed in sources.items():
        targets = {
            inside if inside in sources else module
            for module, attribute in imported(parsed)
            for inside in [f"{module}.{attribute}"]
        }
        found[name] = (targets & sources.keys()) - {name}
    return found


def circles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Return sets of nodes that reach each other."""

    @cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph[waiting.pop()]:
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return frozenset(seen)

    found: list[set[str]] = []
    for node in graph:
        if node in reached(node) and not any(node in circle for circle in found):
            found.append({node} | {other for other in reached(node) if node in reached(other)})
    return found


def test_no_private_name_of_another_package_is_used() -> None:
    found = {
        f"{path.relative_to(ROOT / 'autopeft' if path.is_relative_to(ROOT / 'autopeft') else ROOT)}: {name}"
        for path in modules().values()
        for name in private_names(tree(path))
    }
    assert found == PRIVATE.keys(), "Use a public name, or give the reason here why there is none."
    assert len(PRIVATE) <= MOST_PRIVATE
    assert not any("optuna" in name for name in PRIVATE)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from optuna._hypervolume import wfg", {"optuna._hypervolume.wfg"}),
        ("from optuna.study import _tell", {"optuna.study._tell"}),
        ("import torch._subclasses", {"torch._subclasses"}),
        ("import torch as t\nt._C._log_api_usage_once('')", {"torch._C._log_api_usage_once", "torch._C"}),
        ("def later() -> None:\n    from peft import _x", {"peft._x"}),
        ("import torch\ntorch.__version__\nself._own.x", set()),
        ("def f(model):\n    return model.config._attn", {"model.config._attn"}),
        ("def f(model):\n    model._attn = 1", {"model._attn"}),
        ("def f(other, pair):\n    self._x = other._x\n    return pair._replace(a=1)", set()),
        ("from __future__ import annotations\nfrom autopeft.core import _x", set()),
    ],
)
def test_private_names_are_found(source: str, expected: set[str]) -> None:
    assert private_names(ast.parse(source)) == expected


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = edges({name: tree(path) for name, path in modules().items()})
    assert circles(graph) == []


def test_circles_are_found_where_only_types_are_imported() -> None:
    sources = {
        "autopeft.a": "from autopeft.b import B",
        "autopeft.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from autopeft import c",
        "autopeft.c": "import autopeft.a",
        "autopeft.d": "from autopeft.a import A",
    }
    graph = edges({name: ast.parse(source) for name, source in sources.items()})
    assert circles(graph) == [{"autopeft.a", "autopeft.b", "autopeft.c"}]


def test_the_root_and_the_rooms_can_be_counted_on_fingers() -> None:
    at_root = [path for path in modules().values() if path.parent == ROOT / "autopeft"]
    rooms = {name.split(".")[1] for name, path in modules().items() if path not in at_root}
    assert len(at_root) <= MOST_ROOT_MODULES
    assert len(rooms) <= MOST_ROOMS
