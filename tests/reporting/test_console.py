"""What is shown while a search runs."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest

from autopeft.reporting.console import SearchProgress


def test_a_notebook_without_widgets_shows_lines_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings are errors here; rich has one where it draws a bar."""
    shown: list[str] = []

    def display(rendered: Any) -> None:
        shown.append(rendered.text.strip())

    notebook = type("ZMQInteractiveShell", (), {})  # by whose name rich knows a notebook
    module = ModuleType("IPython.display")
    vars(module)["display"] = display
    monkeypatch.setattr(builtins, "get_ipython", notebook, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with SearchProgress() as progress:
        progress.say("trial 3")
        progress.update(0.5, front_size=2, hypervolume=0.1)
    assert shown == ["trial 3"]
