"""How autopeft says what was wrong, what was expected and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, valid: Iterable[str]) -> str | None:
    """Return the valid choice closest to what was given, or None where nothing is close."""
    matches = difflib.get_close_matches(given, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_choice(kind: str, given: str, valid: Iterable[str]) -> ValueError:
    """Build the error for a name that is none of the valid ones.

    Args:
        kind: What the name stands for, as in "column" or "sampler".
        given: The name the user wrote.
        valid: Every name that would have been accepted.

    Returns:
        A ValueError (to be raised by the caller) that names the valid choices and the nearest one.
    """
    choices = list(valid)
    close = nearest(given, choices)
    hint = f"; did you mean {close!r}?" if close is not None else "."
    listed = ", ".join(choices) if choices else "none"
    return ValueError(f"Unknown {kind} {given!r}: expected one of {listed}{hint}")


def check_whole(name: str, value: object, *, least: int, what: str = "a whole number") -> None:
    """Raise where a value is no whole number from a least one up.

    Args:
        name: What the value is called.
        value: What was given.
        least: The least that is valid.
        what: What the number counts, as in "a number of trainings".

    Raises:
        ValueError: Says what was given and what is valid.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {what} from {least} up, got {value!r}.")


def check_share(name: str, share: float, *, of: str) -> None:
    """Raise where a value is no share in [0, 1].

    Args:
        name: What the value is called.
        share: What was given.
        of: What it is a share of, as in "trials".

    Raises:
        ValueError: Says what was given and what is valid.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is a share of the {of} in [0, 1], got {share!r}.")
