"""What other packages make known under a name, by entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any


def load_entry_point(kind: str, name: str) -> Any:
    """Return what a package's entry point of a name gives; None where there is none.

    Args:
        kind: "methods", "tasks", "spaces", "executors" or "samplers": the group is `autopeft.` and the kind.
        name: The entry point's.
    """
    return next((entry.load() for entry in entry_points(group=f"autopeft.{kind}", name=name)), None)
