"""Cases of a parametrised test that are left to `make test-all`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_cases(*cases: Any) -> list[Any]:
    """Return cases of one argument, marked as slow."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def slow_unless(is_quick: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the cases; those of which `is_quick` says no are marked as slow."""
    return [case if is_quick(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]
