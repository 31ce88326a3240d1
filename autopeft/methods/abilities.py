"""What the installed peft makes of a family, found out on one small layer."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Site
from autopeft.core.method_specs import method_spec
from autopeft.methods.base import Trainable
from autopeft.methods.peft_base import PeftMethod
from autopeft.models.site_shapes import SiteShape

_WIDTH = 64  # which every family's smallest size divides
_NEAR = 1e-4

PROBED_SHAPE = SiteShape(
    site=Site(0, "query"),
    kind="linear",
    module="layer",
    input_module="layer",
    in_features=_WIDTH,
    out_features=_WIDTH,
    parameters=0,
    bias=_WIDTH,
)
"""The layer that is asked about."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a family of peft's can do."""

    changes_weights: bool  # an injection changes the layer's own weights
    starts_at_base: bool  # right after an injection the layer computes what it did before
    merges: bool  # the weights can take a trained adapter in
    takes_4_bits: bool | None  # trains on weights that bitsandbytes packed; None where that is not installed
    takes_8_bits: bool | None


@cache
def abilities(method: PeftMethod) -> Abilities:
    """Find out what a family can do."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        layer, inputs = nn.Linear(_WIDTH, _WIDTH), torch.randn(8, _WIDTH)
        weight, expected = layer.weight.detach().clone(), layer(inputs)
        model, trainable = _injected(method, layer)
        changes_weights = not torch.equal(layer.weight, weight)
        starts_at_base = torch.allclose(model["layer"](inputs), expected, atol=_NEAR)
        _draw(trainable)
        adapted: Any = model["layer"]
        return Abilities(
            changes_weights=changes_weights,
            starts_at_base=starts_at_base,
            merges=_merges(adapted, inputs),
            takes_4_bits=(in_4_bits := _trains_on(method, "Linear4bit", quant_type="nf4")),
            # Families that train on 8-bit layers alone read the packed weight, and memory cannot be counted.
            takes_8_bits=in_4_bits and _trains_on(method, "Linear8bitLt", has_fp16_weights=False),
        )


def _injected(method: PeftMethod, layer: nn.Module) -> tuple[nn.ModuleDict, Trainable]:
    specification = method_spec(method.name)
    size = None if specification.size_name is None else specification.sizes[0]
    model, weight = nn.ModuleDict({"layer": layer}).eval(), layer.get_parameter("weight")
    # By these attributes of a model, which transformers sets, peft knows that layers are packed.
    vars(model)["is_loaded_in_4bit"] = weight.dtype == torch.uint8
    vars(model)["is_loaded_in_8bit"] = weight.dtype == torch.int8
    return model, method.inject(model, {PROBED_SHAPE.site: (PROBED_SHAPE, Adapter(method.name, size))})


def _draw(trainable: Trainable) -> None:
    with torch.no_grad():
        for parameter in _trained(trainable):
            parameter.add_(0.05 * torch.randn_like(parameter))


def _trained(trainable: Trainable) -> list[Tensor]:
    return [tensor for named in trainable.values() for tensor in named.values() if tensor.requires_grad]


def _merges(layer: Any, inputs: Tensor) -> bool:
    expected = layer(inputs)
    try:
        layer.merge(safe_merge=True)
    except NotImplementedError:
        return False
    return torch.allclose(layer(inputs), expected, atol=_NEAR)


def _trains_on(method: PeftMethod, kind: str, **options: Any) -> bool | None:
    """Return whether it trains on a kind of bitsandbytes' layers; None where there is no bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    make: Any = getattr(importlib.import_module("bitsandbytes.nn"), kind)
    layer, inputs = make(_WIDTH, _WIDTH, **options).to("cpu"), torch.randn(8, _WIDTH)
    expected = layer(inputs)
    try:
        model, trainable = _injected(method, layer)
        starts = torch.allclose(model["layer"](inputs), expected, atol=0.02)  # their kernels are coarse
        _draw(trainable)
        output: Tensor = model["layer"](inputs)
        output.square().sum().backward()
    except Exception:  # whatever peft fails with, it cannot be trained there
        return False
    return starts and all(tensor.grad is not None for tensor in _trained(trainable))
