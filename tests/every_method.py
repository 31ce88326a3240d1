"""Every adapter method, for tests with a case a method; most families run in `make test-all`."""

from __future__ import annotations

import pytest

from autopeft.core.method_specs import METHOD_SPECS

# Each sits or trains in another way than the others: in peft, with shared parameters, at norms, by hooks, in
# attention, in a copy of the weights, with tensors that are kept but not trained.
METHODS_BY_DEFAULT = ("lora", "vera", "layernorm", "series", "prefix", "full", "sparse")
EVERY_METHOD = [
    name if name in METHODS_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
    for name in METHOD_SPECS
]
ON_STATE_SPACES = tuple(name for name, row in METHOD_SPECS.items() if row.kinds == {"state space"})
"""Methods for which a BERT has no place."""


def architecture_for(method: str) -> str:
    """Return the tiny classifier that a method is tried on."""
    return "jamba" if method in ON_STATE_SPACES else "bert"
