"""Linear layers whose weights bitsandbytes holds in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

_BITS = {"Params4bit": 4, "Int8Params": 8}  # by name, as peft does: bitsandbytes need not be installed


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer's own weight, not that of one inside it, is held in 4 or 8 bits."""
    return _bits(layer) is not None


def _bits(layer: nn.Module) -> int | None:
    return _BITS.get(type(dict(layer.named_parameters(recurse=False)).get("weight")).__name__)


def full_weight(layer: nn.Module, weight: nn.Parameter | None = None) -> Tensor:
    """Return a layer's weight as floating-point numbers: a copy, (out, in), where it is quantised.

    Args:
        layer: The layer.
        weight: The weight of the layer where another stands in for it.
    """
    weight = layer.get_parameter("weight") if weight is None else weight
    if not is_quantized(layer):
        return weight.detach()
    found: Tensor = dequantize_bnb_weight(weight, state=getattr(layer, "state", None))
    return found


def state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield what 8-bit layers hold beside their parameters: after a prediction also the weights again."""
    for layer in model.modules():
        if is_quantized(layer) and hasattr(layer, "state"):
            yield from (each for each in vars(layer.state).values() if isinstance(each, Tensor))


def keep_as_loaded(model: nn.Module) -> dict[str, int]:
    """Keep bitsandbytes from changing layers in forward passes, and return the bits of those it quantised.

    On processors with AVX512-BF16 its 4-bit layers rearrange their weights in the first pass without
    gradients, and no gradient flows through them from then on. Biases are cast to the type of inputs: they
    are rounded here, so that no later cast changes their values.

    Raises:
        ValueError: The weights were rearranged already.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if (bits := _bits(module)) is None:
            continue
        found[name] = bits
        layer: Any = module
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"The 4-bit weights of {name} were rearranged for inference, and give no gradients: pass a "
                "model that made no predictions yet, or the name it is loaded by."
            )
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:
            dtype = getattr(layer, "compute_dtype", None) or layer.bias.dtype
            layer.bias.data = layer.bias.data.bfloat16().to(dtype)
    return found


def quantization_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Return how bitsandbytes quantised a model, as arguments of `BitsAndBytesConfig`; None if it did not."""
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return None
    return {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
