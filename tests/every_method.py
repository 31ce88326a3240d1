"""Every adapter method, for tests with a case a method; most families run in `make test-all`."""

from __future__ import annotations

import pytest

from autopeft.core.method_specs import METHOD_SPECS

# Each sits or trains in another way than the others: a peft config of its own, shared parameters, a size that
# is no rank; norms, biases, hooks, attention; weights in a copy, tensors that are kept but not trained.
METHODS_BY_DEFAULT = (
    *("lora", "ia3", "dora", "vera", "c3a"),
    *("layernorm", "bitfit", "series", "parallel", "prefix"),
    *("full", "sparse"),
)
EVERY_METHOD = [
    name if name in METHODS_BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
    for name in METHOD_SPECS
]
