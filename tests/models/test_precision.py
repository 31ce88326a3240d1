"""What a device computes in when nobody says it."""

from __future__ import annotations

import pytest
import torch

from autopeft.core.precision import autocast, quickest_precision
from autopeft.training.settings import Training

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16-mixed"),
        ({"avx512_bf16": False, "avx2": True}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_processors_made_for_bfloat16_compute_in_it(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert quickest_precision(CPU) == expected
    assert Training(device="cpu").resolved_precision() == expected
    assert Training(device="cpu", precision="32-true").resolved_precision() == "32-true"
    assert Training(device="cpu", precision="bf16-mixed").resolved_precision() == "bf16-mixed"


def test_a_torch_that_does_not_tell_computes_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert quickest_precision(CPU) == "32-true"


def test_autocast_is_on_in_mixed_precision_alone() -> None:
    layer, inputs = torch.nn.Linear(4, 4), torch.zeros(2, 4)
    with autocast("bf16-mixed", "cpu"):
        assert layer(inputs).dtype == torch.bfloat16
        with autocast("32-true", "cpu"):
            assert layer(inputs).dtype == torch.float32
