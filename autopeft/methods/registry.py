"""The torch side of every method that a configuration may name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods.base import Method
from autopeft.methods.bitfit import BitFit
from autopeft.methods.bottleneck import Bottleneck, Parallel, Series
from autopeft.methods.ia3 import IA3
from autopeft.methods.layernorm import LayerNormTuning
from autopeft.methods.lora import Lora
from autopeft.methods.prefix_tuning import Prefix, PrefixTuning

_METHODS = (Lora(), IA3(), LayerNormTuning(), BitFit(), Series(), Parallel(), PrefixTuning())

MERGEABLE = ("lora", "ia3", "layernorm", "bitfit")
"""Methods whose adapters are an update of weights; the others add computation of their own."""

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _METHODS})
"""The torch side of every method in `METHOD_SPECS`; those that replace modules come first."""

assert METHODS.keys() == METHOD_SPECS.keys()


def unmergeable(configuration: Configuration) -> Configuration:
    """Return the adapters that no weight can take in, as a configuration of their own."""
    return Configuration(
        {
            site: [adapter for adapter in several if adapter.method not in MERGEABLE]
            for site, several in configuration.adapters.items()
        }
    )


def carries_adapters(model: nn.Module) -> bool:
    """Return whether adapters of peft or of autopeft are attached to a model, or it is a `PeftModel`."""
    adapters = (BaseTunerLayer, Bottleneck, Prefix)
    return hasattr(model, "peft_config") or any(isinstance(module, adapters) for module in model.modules())
