from __future__ import annotations

import pytest

from autopeft.core.errors import nearest, unknown_choice


def test_names_what_was_wrong_and_what_was_expected() -> None:
    error = unknown_choice("sampler", "tpee", ("tpe", "random"))
    assert isinstance(error, ValueError)
    assert str(error) == "Unknown sampler 'tpee': expected one of tpe, random; did you mean 'tpe'?"


def test_gives_no_hint_where_nothing_is_close() -> None:
    assert str(unknown_choice("role", "xyz", ["query"])) == ("Unknown role 'xyz': expected one of query.")


def test_says_so_where_nothing_is_valid() -> None:
    assert str(unknown_choice("column", "text", [])).endswith("expected one of none.")


def test_reads_valid_choices_from_an_iterator_once() -> None:
    message = str(unknown_choice("role", "querry", (name for name in ("query", "key"))))
    assert "query, key" in message
    assert "'query'?" in message


@pytest.mark.parametrize(
    ("given", "expected"), [("quary", "query"), ("Value", "value"), ("zzz", None), ("", None)]
)
def test_nearest_choice(given: str, expected: str | None) -> None:
    assert nearest(given, ("query", "key", "value")) == expected


def test_a_long_value_is_shown_by_its_ends() -> None:
    message = str(unknown_choice("role", f"query{'x' * 5000}key", ["query"]))
    assert len(message) < 300
    assert "'queryx" in message
    assert "xkey'" in message
