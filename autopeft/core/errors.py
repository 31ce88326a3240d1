"""How autopeft says what was wrong, what was expected and the nearest valid choice.

A ValueError is for what a user can mend, before anything is trained; a RuntimeError for a training or a check
that failed; an OSError for the disk. Docstrings name them where a user calls, or a caller catches them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_LONGEST = 200


class NoCandidateError(ValueError):
    """No candidate of a search can keep its constraints."""


def shown(value: object) -> str:
    """Return a value as Python writes it, without its middle where that is long: files may hold anything."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 4 :]}"


def nearest(given: str, valid: Iterable[str]) -> str | None:
    """Return the valid choice closest to what was given, or None where nothing is close."""
    return next(iter(difflib.get_close_matches(str(given), list(valid), n=1, cutoff=0.5)), None)


def unknown_choice(kind: str, given: str, valid: Iterable[str]) -> ValueError:
    """Return the error for a name of a kind ("column", "sampler") that is none of the valid ones.

    It lists these, and says the nearest.
    """
    choices = list(valid)
    close = nearest(given, choices)
    hint = f"; did you mean {close!r}?" if close is not None else "."
    return ValueError(f"Unknown {kind} {shown(given)}: expected one of {', '.join(choices) or 'none'}{hint}")


def check_choice(kind: str, valid: Collection[str], *given: object) -> None:
    """Raise the error of `unknown_choice` for the first of some names that is none of the valid ones."""
    for name in given:
        if name not in valid:
            raise unknown_choice(kind, str(name), valid)


def checked_names(kind: str, names: Sequence[str], valid: Iterable[str]) -> tuple[str, ...]:
    """Return names (or the only one) as a tuple; raise a ValueError where one is invalid or given twice."""
    given = (names,) if isinstance(names, str) else tuple(names)
    choices = tuple(valid)
    if not given:
        raise ValueError(f"Expected a {kind}, one or more of {', '.join(choices)}.")
    check_choice(kind, choices, *given)
    if len(set(given)) != len(given):
        raise ValueError(f"A {kind} is named twice: {', '.join(given)}.")
    return given


def check_whole(name: str, value: object, *, least: int, what: str = "a whole number") -> None:
    """Raise a ValueError where a value is no whole number (of `what`) from a least one up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {what} from {least} up, got {shown(value)}.")


def check_flags(**values: object) -> None:
    """Raise a ValueError where a value is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is True or False, got {shown(value)}.")


def check_share(name: str, share: float, *, of: str) -> None:
    """Raise a ValueError where a value is no share in [0, 1] of something."""
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is a share of the {of} in [0, 1], got {shown(share)}.")


def check_numbers(*, least: float | None = None, above: float = -math.inf, **values: Any) -> None:
    """Raise a ValueError where a value is no finite number from `least` up, or else `above` a bound."""
    bound = f"above {above:g}" if least is None else f"of at least {least:g}"
    for name, value in values.items():
        if not is_finite_number(value) or (value <= above if least is None else value < least):
            hint = _number_hint(value)
            raise ValueError(f"{name} must be a finite number {bound}, got {shown(value)}{hint}.")


def is_finite_number(value: object) -> bool:
    """Say whether a value is a number that a float can hold, and no truth value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of a whole number that is too large
        return False


def _number_hint(value: Any) -> str:
    """Say what to write where YAML, which wants a point in "1.0e-3", took a number for text."""
    try:
        return f"; write {float(value):g}" if isinstance(value, str) else ""
    except ValueError:
        return ""
