"""The names a configuration is written in: roles of modules in a block, and adapter methods.

Nothing here knows torch: a configuration can be read, compared and counted without loading a model.
The torch side of a method is an `autopeft.methods.Method` of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["linear", "experts", "norm", "convolution", "attention", "ffn"]
OptionValue = bool | int | float | str

LINEAR_ROLES = (
    "query",
    "key",
    "value",
    "qkv",
    "attention_output",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_attention_output",
    "ffn_up",
    "ffn_gate",
    "ffn_gate_up",
    "ffn_down",
)
ENCODER_FED_ROLES = ("cross_key", "cross_value")
"""Roles in a decoder that are given what the encoder returns."""
EXPERT_ROLES = ("ffn_experts_up", "ffn_experts_gate_up", "ffn_experts_down")
NORM_ROLES = (
    "attention_norm",
    "attention_post_norm",
    "cross_attention_norm",
    "ffn_norm",
    "ffn_post_norm",
    "query_norm",
    "key_norm",
)

KIND_OF_ROLE: Mapping[str, Kind] = {
    **dict.fromkeys(LINEAR_ROLES, "linear"),
    **dict.fromkeys(EXPERT_ROLES, "experts"),
    **dict.fromkeys(NORM_ROLES, "norm"),
    "convolution": "convolution",
    "attention": "attention",
    "ffn": "ffn",
}
ROLES = tuple(KIND_OF_ROLE)
"""Every role, in the order in which tables and pictures show them."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What a configuration may say of an adapter method."""

    name: str  # the name in configurations, as in "lora"
    symbol: str  # one or two letters for the compact picture
    kinds: frozenset[Kind]  # the kinds of site it can sit on
    # What its size means ("rank", "bottleneck width", ...); None for a method without one.
    size_name: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)  # every option with its default
    # Options that are numbers with a lower bound (exclusive).
    minimums: Mapping[str, float] = field(default_factory=dict)
    # Options that are names, with the valid ones.
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Methods that train the same numbers or take the same place, so that a site carries one of them at most.
    excludes: frozenset[str] = frozenset()
    needs_bias: bool = False  # whether the module must have a bias
    # Whether the model must compute attention through transformers' attention interface.
    needs_attention_interface: bool = False


_LINEAR: frozenset[Kind] = frozenset({"linear"})
_SUBLAYER: frozenset[Kind] = frozenset({"attention", "ffn"})
_ACTIVATIONS = ("gelu", "relu", "silu", "tanh")

METHOD_SPECS: dict[str, MethodSpec] = {
    specification.name: specification
    for specification in (
        MethodSpec(
            name="lora",
            symbol="L",
            kinds=frozenset({"linear", "experts"}),
            size_name="rank",
            options={"alpha": 8, "rslora": True, "dropout": 0.0},
            minimums={"alpha": 0.0},
            excludes=frozenset({"ia3"}),
        ),
        MethodSpec(name="ia3", symbol="I", kinds=_LINEAR, excludes=frozenset({"lora"})),
        MethodSpec(name="layernorm", symbol="N", kinds=frozenset({"norm"}), excludes=frozenset({"bitfit"})),
        MethodSpec(
            name="bitfit",
            symbol="B",
            kinds=frozenset({"linear", "norm", "convolution"}),
            excludes=frozenset({"layernorm"}),
            needs_bias=True,
        ),
        MethodSpec(
            name="series",
            symbol="S",
            kinds=_SUBLAYER,
            size_name="bottleneck width",
            options={"activation": "gelu"},
            choices={"activation": _ACTIVATIONS},
        ),
        MethodSpec(
            name="parallel",
            symbol="P",
            kinds=_SUBLAYER,
            size_name="bottleneck width",
            options={"activation": "gelu", "scaling": 4.0},
            minimums={"scaling": 0.0},
            choices={"activation": _ACTIVATIONS},
        ),
        MethodSpec(
            name="prefix",
            symbol="X",
            kinds=frozenset({"attention"}),
            size_name="prefix length",
            options={"initial_std": 0.02},
            minimums={"initial_std": 0.0},
            needs_attention_interface=True,
        ),
    )
}
"""Every method a configuration may name."""
