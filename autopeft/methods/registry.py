"""The torch side of every method that a configuration may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS, MethodSpec, PeftSpec
from autopeft.core.peft_families import PEFT_FAMILIES
from autopeft.methods.base import Method, Switchable
from autopeft.methods.bitfit import BitFit
from autopeft.methods.bottleneck import Parallel, Series
from autopeft.methods.compacter import Compacter
from autopeft.methods.corda import CorDA
from autopeft.methods.eva import Eva
from autopeft.methods.full import Full
from autopeft.methods.ia3 import IA3
from autopeft.methods.ladder import Ladder
from autopeft.methods.layernorm import LayerNormTuning
from autopeft.methods.lora import Lora
from autopeft.methods.lora_fa import LoraFA
from autopeft.methods.lora_ga import LoraGA
from autopeft.methods.lora_sparse import LoraSparse
from autopeft.methods.lora_xs import LoraXS
from autopeft.methods.loreft import LoReFT
from autopeft.methods.peft_family import PeftFamily
from autopeft.methods.prefix_tuning import PrefixTuning
from autopeft.methods.scale_and_shift import SSF
from autopeft.methods.sdt import SDT
from autopeft.methods.sized_by_shape import C3A, OSF, RandLora
from autopeft.methods.sparse import Sparse
from autopeft.methods.state_offset import StateOffsetTuning

_WITH_A_FILE = (
    *(Lora(), IA3(), LayerNormTuning(), BitFit(), Series(), Parallel(), PrefixTuning()),
    *(Eva(), LoraGA(), CorDA()),
    *(Full(), SSF(), Sparse(), LoraSparse(), LoraFA(), LoraXS(), Compacter(), LoReFT(), Ladder()),
    *(SDT(), StateOffsetTuning()),
)
_SIZED_BY_SHAPE: Mapping[str, Callable[[PeftSpec], Method]] = {"c3a": C3A, "osf": OSF, "randlora": RandLora}
"""Families of peft's whose size is not the number that peft's config has."""

_METHODS: dict[str, Method] = {method.name: method for method in _WITH_A_FILE}
for _row in PEFT_FAMILIES:
    _METHODS[_row.name] = _SIZED_BY_SHAPE.get(_row.name, PeftFamily)(_row)

_BUILT_IN = frozenset(_METHODS)

METHODS: Mapping[str, Method] = MappingProxyType(_METHODS)
"""The torch side of every method in `METHOD_SPECS`."""


def register(method: Method, specification: MethodSpec) -> None:
    """Make a method of your own known, or replace an earlier one of yours with the same name.

    Raises:
        ValueError: The two have different names, one of autopeft's methods has the name, or another method
            the symbol.
    """
    name = specification.name
    if getattr(method, "name", None) != name:
        raise ValueError(
            f"The name of {type(method).__name__} is {getattr(method, 'name', None)!r} and that of its "
            f"specification {name!r}: give both the same."
        )
    for known in METHOD_SPECS.values():
        # A notebook's cell is run more than once.
        is_taken = name in _BUILT_IN if known.name == name else known.symbol == specification.symbol
        if is_taken:
            raise ValueError(
                f"{name!r} cannot be registered with the symbol {specification.symbol!r}: "
                f"there is {known.name!r} with {known.symbol!r}."
            )
    METHOD_SPECS[name] = specification
    _METHODS[name] = method


def is_found_elsewhere(name: str) -> bool:
    """Return whether another process finds a method by its name: it is autopeft's, or has an entry point."""
    return name in _BUILT_IN or bool(entry_points(group="autopeft.methods", name=name))


def unmergeable(configuration: Configuration) -> Configuration:
    """Return the adapters that no weight can take in, as a configuration of their own."""
    return Configuration(
        {
            site: [adapter for adapter in several if not METHODS[adapter.method].is_mergeable]
            for site, several in configuration.adapters.items()
        }
    )


def carries_adapters(model: nn.Module) -> bool:
    """Return whether adapters of peft or of autopeft are attached to a model, or it is a `PeftModel`."""
    adapters = (BaseTunerLayer, Switchable)
    return hasattr(model, "peft_config") or any(isinstance(module, adapters) for module in model.modules())
