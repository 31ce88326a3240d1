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

_SITE = Site(0, "query")
_WIDTH = 64  # which every family's smallest size divides
_NEAR = 1e-4


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a family of peft's can do."""

    changes_weights: bool  # an injection changes the layer's own weights
    starts_at_base: bool  # right after an injection the layer computes what it did before
    merges: bool  # the weights can take a trained adapter in
    converts: bool  # peft can make a LoRA of a trained adapter
    takes_packed: bool  # the layer may be packed in 4 bits by bitsandbytes; False where that is not installed


@cache
def abilities(method: PeftMethod) -> Abilities:
    """Find out what a family can do."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
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
            converts=bool(adapted.supports_lora_conversion(method.name)),
            merges=_merges(adapted, inputs),
            takes_packed=_takes_packed(method),
        )


def _injected(method: PeftMethod, layer: nn.Module) -> tuple[nn.ModuleDict, Trainable]:
    specification = method_spec(method.name)
    size = None if specification.size_name is None else specification.sizes[0]
    shape = SiteShape(
        site=_SITE,
        kind="linear",
        module="layer",
        input_module="layer",
        in_features=_WIDTH,
        out_features=_WIDTH,
        parameters=0,
        bias=_WIDTH,
    )
    model = nn.ModuleDict({"layer": layer}).eval()
    vars(model)["is_loaded_in_4bit"] = (
        not isinstance(layer.weight, Tensor) or layer.weight.dtype == torch.uint8
    )
    return model, method.inject(model, {_SITE: (shape, Adapter(method.name, size))})


def _draw(trainable: Trainable) -> None:
    with torch.no_grad():
        for named in trainable.values():
            for parameter in named.values():
                parameter.add_(0.05 * torch.randn_like(parameter))


def _merges(layer: Any, inputs: Tensor) -> bool:
    expected = layer(inputs)
    try:
        layer.merge(safe_merge=True)
    except NotImplementedError:
        return False
    return torch.allclose(layer(inputs), expected, atol=_NEAR)


def _takes_packed(method: PeftMethod) -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    layers: Any = importlib.import_module("bitsandbytes.nn")
    layer, inputs = layers.Linear4bit(_WIDTH, _WIDTH, quant_type="nf4").to("cpu"), torch.randn(8, _WIDTH)
    expected = layer(inputs)
    try:
        model, trainable = _injected(method, layer)
        starts = torch.allclose(model["layer"](inputs), expected, atol=0.02)  # kernels for 4 bits are coarse
        _draw(trainable)
        output: Tensor = model["layer"](inputs)
        output.square().sum().backward()
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return False
    return starts and all(p.grad is not None for named in trainable.values() for p in named.values())
