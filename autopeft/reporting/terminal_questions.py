"""What `autopeft init` asks at a terminal; without one, what is missing is an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import typer


def asked(given: str | None, option: str, question: str) -> str:
    """Return what was given, or what is answered.

    Raises:
        ValueError: Nothing was given, and there is no terminal.
    """
    if given is None and not is_terminal():
        raise ValueError(f"{option} is missing, and there is no terminal to ask at.")
    return str(typer.prompt(question)) if given is None else given


def column_question() -> Callable[[str, Sequence[str]], tuple[str, ...]] | None:
    """Return what asks for one of several columns, or for two of texts; None without a terminal."""
    return _asked_column if is_terminal() else None


def is_terminal() -> bool:
    """Whether somebody can answer."""
    return sys.stdin.isatty()


def _asked_column(setting: str, columns: Sequence[str]) -> tuple[str, ...]:
    more = ", or two with a comma between" if setting == "text" else ""
    answer = str(typer.prompt(f"Column of the {setting}: {', '.join(columns)}{more}")).strip()
    is_pair = setting == "text" and answer not in columns
    return tuple(name.strip() for name in answer.split(",")) if is_pair else (answer,)
