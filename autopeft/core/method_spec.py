"""What a configuration may say of an adapter method, and the kinds of site there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["linear", "experts", "norm", "convolution", "state space", "attention", "ffn", "block"]
OptionValue = bool | int | float | str

B_RATE = "b_rate"
"""Option of LoRA that peft's config does not have: the learning rate of B as a multiple of A's (LoRA+)."""
LORA_OPTIONS: Mapping[str, OptionValue] = {"alpha": 8, "rslora": True, "dropout": 0.0, B_RATE: 1.0}
"""Options of LoRA, and of methods that are LoRA to peft."""
LORA_MINIMUMS: Mapping[str, float] = {"alpha": 0.0, B_RATE: 0.0}


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """What a configuration may say of an adapter method."""

    name: str  # the name in configurations, as in "lora"
    symbol: str  # one or two letters for the compact picture
    kinds: frozenset[Kind]  # the kinds of site it can sit on
    # What its size means ("rank", "bottleneck width", ...); None for a method without one.
    size_name: str | None = None
    # The (smallest, largest) size that a space offers where nobody says others.
    sizes: tuple[int, int] = (1, 64)
    options: Mapping[str, OptionValue] = field(default_factory=dict)  # every option with its default
    # Options that are numbers with a lower bound (exclusive).
    minimums: Mapping[str, float] = field(default_factory=dict)
    # Options that are names, with the valid ones.
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Methods that train the same numbers or take the same place, so that a site carries one of them at most.
    excludes: frozenset[str] = frozenset()
    # Whether it takes a linear layer's place: a site carries one such method at most.
    wraps: bool = False
    is_lora: bool = False  # whether it is LoRA to peft, at the latest once exported
    needs_bias: bool = False  # whether the module must have a bias
    # Whether the model must compute attention through transformers' attention interface.
    needs_attention_interface: bool = False
    # Whether gradients go back through the blocks of its stack above its site.
    backpropagates: bool = True
    # The learning rate that suits it, as a multiple of LoRA's: its parameters are trained at this multiple of
    # the configuration's learning rate.
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PeftSpec(MethodSpec):
    """A method that peft implements on linear layers, said in the fields of peft's config."""

    kinds: frozenset[Kind] = frozenset({"linear"})
    wraps: bool = True
    peft_type: str  # its name in `peft.PeftType`
    size_field: str = ""  # the config's field that is the size; empty for a method without one
    # The config's field for α, which is the option "scaling" times the size.
    alpha_field: str = ""
    # The config's fields of options that have another name there.
    fields: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of the config with the same value always
