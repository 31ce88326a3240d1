"""YAML and JSON that a stranger may have written: what is wrong with it is a ValueError that names it.

Neither may take memory or time out of proportion to what a person would write: aliases of YAML can stand for
more values than there are atoms, and lists can lie in each other deeper than a parser's stack.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES = 4 * 2**20  # a site takes about 60 bytes: more than any network has
_MOST_VALUES = 1_000_000
_OF_CONSTRUCTORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
"""What PyYAML's constructors raise of "!!int x", "!!bool x", "!!timestamp x", 99-99-99 or `[[[…`."""


def read_text(path: Path) -> str:
    """Return the text of a file of at most 4 MiB.

    Raises:
        ValueError: It is missing, no regular file, too large, or no UTF-8.
    """
    if not path.is_file():  # a pipe would be waited for, a device never ends
        raise ValueError(f"Cannot read {path}: it is missing, or no file.")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"{path} is larger than {_MOST_BYTES // 2**20} MiB: it holds something else.")
        return content.decode()
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from error


def parse_json(text: str, name: str) -> Any:
    """Return what a JSON text holds; errors call it by its name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error


def parse_yaml(text: str, name: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return what a YAML text holds, read with a safe loader; errors call it by its name."""
    try:
        reader = loader(text)
        node = reader.get_single_node()
        is_small = node is None or _count(node, {}) <= _MOST_VALUES  # merging keys copies what they stand for
        if is_small:
            return None if node is None else reader.construct_document(node)
    except (yaml.YAMLError, *_OF_CONSTRUCTORS) as error:
        raise ValueError(f"{name} is not valid YAML: {error}") from error
    raise ValueError(f"{name} stands for more than {_MOST_VALUES:,} values, or holds itself, by aliases.")


def _count(node: yaml.Node, counted: dict[yaml.Node, int]) -> int:
    """Return the number of values that a node stands for, each as often as it stands there."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if node not in counted:
        counted[node] = _MOST_VALUES + 1  # of what holds itself
        parts = chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        counted[node] = 1 + sum(_count(part, counted) for part in parts)
    return counted[node]
