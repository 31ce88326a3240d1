"""Tiny language models whose linear layers bitsandbytes holds in 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions, Quantization
from autopeft.models.quantized_layers import is_quantized
from autopeft.tasks import Task
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8")
WIDE: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": 64}}
"""Wide enough for whole blocks of 64 weights, as bitsandbytes packs them."""

# bitsandbytes says what its CPU kernels lack, and each cast of 8-bit layers' inputs.
quiet = pytest.mark.filterwarnings("ignore")


def require_bitsandbytes() -> None:
    """Skip the test where there is no bitsandbytes, as on platforms that it has no wheel for."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'autopeft[test]'")


def save_base(folder: Path, architecture: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a tiny model with its tokenizer, to be quantised."""
    require_bitsandbytes()
    options = WIDE.get(architecture, {"hidden_size": 64, "intermediate_size": 128})
    tiny_language_model(architecture, **options).to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    tiny_chat_tokenizer().save_pretrained(folder)
    return folder


def quantized(base: Path, quantization: Quantization | None, task: Task, **options: Any) -> Backbone:
    """Load a tiny model in 4 or 8 bits, or as it is stored."""
    return Backbone.load(base, task.head, options=LoadOptions(quantization=quantization, **options))


def bytes_of_scales(model: nn.Module) -> int:
    """Return the bytes that quantised layers keep beside their parameters."""
    total = 0
    for module in filter(is_quantized, model.modules()):
        layer: Any = module
        state = getattr(layer.weight, "quant_state", None)
        kept = [layer.state.SCB] if state is None else [state.absmax, state.state2.absmax]
        total += sum(tensor.nbytes for tensor in kept)
    return total
