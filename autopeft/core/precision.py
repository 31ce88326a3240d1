"""The precision that a model computes in."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["32-true", "bf16-mixed"]


def quickest_precision(device: torch.device) -> Precision:
    """Return bf16-mixed where a device multiplies bfloat16 in hardware, else 32-true.

    On x86 those are processors with AVX512-BF16 or AMX. Weights, adapters and the optimizer's state stay in
    single precision either way.
    """
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    in_hardware = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if in_hardware else "32-true"


def autocast(precision: Precision, device_type: str) -> torch.autocast:
    """Return the context in which a model computes in a precision on "cpu" or "cuda"."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed")
