"""Every adapter method, for tests with a case a method; most families of peft's run in `make test-all`."""

from __future__ import annotations

import pytest

from autopeft.core.method_spec import PeftSpec
from autopeft.core.method_specs import METHOD_SPECS

_FAMILIES = ("dora", "vera", "c3a")  # what is a LoRA, shares parameters, and has a size of its own
METHODS_BY_DEFAULT = [
    name for name, row in METHOD_SPECS.items() if not isinstance(row, PeftSpec) or name in _FAMILIES
]
EVERY_METHOD = [
    name if name in METHODS_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
    for name in METHOD_SPECS
]
