"""The names a configuration is written in: roles of modules in a block, and adapter methods.

Nothing here knows torch: a configuration can be read, compared and counted without loading a model.
The torch side of a method is an `autopeft.methods.Method` of the same name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from autopeft.core.entry_points import load_entry_point
from autopeft.core.errors import check_choice
from autopeft.core.method_spec import (
    B_RATE,
    LORA_MINIMUMS,
    LORA_OPTIONS,
    Kind,
    MethodSpec,
    OptionValue,
    PeftSpec,
)
from autopeft.core.peft_families import PEFT_FAMILIES

__all__ = ["Kind", "MethodSpec", "OptionValue", "PeftSpec"]

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
    "state_space": "state space",
    "attention": "attention",
    "ffn": "ffn",
    "block": "block",
}
ROLES = tuple(KIND_OF_ROLE)
"""Every role, in the order in which tables and pictures show them."""


_LINEAR: frozenset[Kind] = frozenset({"linear"})
_SUBLAYER: frozenset[Kind] = frozenset({"attention", "ffn"})
_STATE_SPACE: frozenset[Kind] = frozenset({"state space"})
_ACTIVATIONS = ("gelu", "relu", "silu", "tanh")
_SPARSE_CHOICES = ("magnitude", "gradient", "random")


def _lora(
    name: str,
    symbol: str,
    *,
    without: Collection[str] = (),
    kinds: frozenset[Kind] = _LINEAR,
    rate: float = 1.0,
) -> MethodSpec:
    """Return LoRA, or what differs from it in how it starts or in what is trained."""
    return MethodSpec(
        name=name,
        symbol=symbol,
        kinds=kinds,
        size_name="rank",
        options={option: value for option, value in LORA_OPTIONS.items() if option not in without},
        minimums=LORA_MINIMUMS,
        wraps=True,
        is_lora=True,
        rate=rate,
    )


METHOD_SPECS: dict[str, MethodSpec] = {
    specification.name: specification
    for specification in (
        _lora("lora", "L", kinds=frozenset({"linear", "experts"})),
        MethodSpec(
            name="ia3",
            symbol="I",
            kinds=_LINEAR,
            wraps=True,
            rate=20.0,  # measured: `python -m benchmarks.family_rates`
        ),
        *PEFT_FAMILIES,
        MethodSpec(
            name="full",
            symbol="Fu",
            kinds=frozenset({"linear", "experts", "convolution"}),
            excludes=frozenset({"bitfit"}),
            wraps=True,
            rate=0.1,  # Schulman et al., "LoRA Without Regret", 2025: LoRA wants ten times its rate
        ),
        MethodSpec(
            name="ssf",
            symbol="Sf",
            kinds=_LINEAR,
            excludes=frozenset({"bitfit"}),
            wraps=True,
            rate=10.0,  # 1e-2 and more in the paper's scripts, where vision's LoRA has 1e-3
        ),
        MethodSpec(
            name="sparse",
            symbol="Sp",
            kinds=_LINEAR,
            size_name="entries",
            sizes=(64, 16384),
            options={"choice": "magnitude"},
            choices={"choice": _SPARSE_CHOICES},
            wraps=True,  # at LoRA's rate, as SHiRA in peft's method comparison
        ),
        MethodSpec(
            name="lora_sparse",
            symbol="Ls",
            kinds=_LINEAR,
            size_name="rank",
            options={"alpha": 8, "density": 0.001, "choice": "magnitude"},
            minimums={"alpha": 0.0, "density": 0.0},
            choices={"choice": _SPARSE_CHOICES},
            wraps=True,
        ),
        _lora("lora_fa", "Lf", without=(B_RATE,)),
        # The rate of these three is measured: `python -m benchmarks.data_initialisation`.
        _lora("eva", "Ev", rate=0.3),
        _lora("lora_ga", "Ga", without=("rslora", "dropout", B_RATE), rate=0.3),
        _lora("corda", "Cd", without=("rslora", "dropout", B_RATE), rate=0.3),
        MethodSpec(
            name="lora_xs",
            symbol="Lx",
            kinds=_LINEAR,
            size_name="rank",
            sizes=(2, 32),
            wraps=True,
            rate=10.0,  # 4e-3 in the paper's scripts
        ),
        MethodSpec(
            name="layernorm",
            symbol="N",
            kinds=frozenset({"norm"}),
            excludes=frozenset({"bitfit"}),
        ),
        MethodSpec(
            name="bitfit",
            symbol="B",
            kinds=frozenset({"linear", "norm", "convolution"}),
            excludes=frozenset({"layernorm", "full", "ssf"}),
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
            sizes=(1, 32),
            options={"initial_std": 0.02},
            minimums={"initial_std": 0.0},
            needs_attention_interface=True,
        ),
        MethodSpec(
            name="compacter",
            symbol="Co",
            kinds=_SUBLAYER,
            size_name="width in fours",
            sizes=(1, 16),
            options={"activation": "gelu"},
            choices={"activation": _ACTIVATIONS},
            rate=10.0,  # 3e-3 in the paper's settings, where its adapters have 3e-4
        ),
        MethodSpec(
            name="loreft",
            symbol="Re",
            kinds=frozenset({"ffn"}),
            size_name="rank",
            sizes=(1, 32),
            options={"positions": 0},
            minimums={"positions": -1},
            rate=3.0,  # 9e-4 in the paper's settings
        ),
        MethodSpec(
            name="ladder",
            symbol="La",
            kinds=frozenset({"block"}),
            size_name="side width",
            sizes=(4, 128),
            backpropagates=False,
            rate=3.0,  # a guess: not measured
        ),
        MethodSpec(
            name="sdt",
            symbol="Sd",
            kinds=_STATE_SPACE,
            size_name="channels",
            sizes=(4, 512),  # at LoRA's rate, as in the paper's scripts
        ),
        MethodSpec(
            name="state_offset",
            symbol="So",
            kinds=_STATE_SPACE,
            rate=0.1,  # 2e-4 in the paper's scripts, where LoRA has 2e-3
        ),
    )
}
"""Every method that a configuration may name, but those of other packages that nobody has named yet."""


def method_spec(name: str) -> MethodSpec:
    """Return what a method's name stands for; one of another package's `autopeft.methods` entry points too.

    Raises:
        ValueError: There is no such method; the message says the nearest.
    """
    if name not in METHOD_SPECS:
        load_entry_point("methods", name)  # which calls `autopeft.methods.register`
        check_choice("method", METHOD_SPECS, name)
    return METHOD_SPECS[name]
