"""What an export is written for, and which configurations each target takes."""

from __future__ import annotations

from collections.abc import Mapping

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_choice
from autopeft.core.method_spec import B_RATE
from autopeft.core.method_specs import method_spec
from autopeft.export.conversion import as_exported
from autopeft.export.folder_format import Layout, adapter_layout
from autopeft.export.serving import ARCHITECTURES, SERVERS
from autopeft.methods import METHODS, Placement, placements, unmergeable
from autopeft.methods.data_initialised import LoraFromData
from autopeft.models.backbone import Backbone

COMPARISON = "peft-method-comparison"
TARGETS: Mapping[str, str] = {
    "peft": "a plain PEFT folder; the default where one peft family holds everything",
    "autopeft": "a folder for each method, loaded by autopeft; the default otherwise",
    "merged": "a whole transformers model, the adapters merged into its weights",
    "lora": "one LoRA in peft's format, made of everything that changes weights",
    "vllm": "the same with one rank and scale, as vLLM reads it",
    "sglang": "as SGLang reads it",
    "llama.cpp": "as llama.cpp's converter to GGUF reads it",
    COMPARISON: "config and training settings for peft's public comparison, without weights",
}
"""What each target is, as a phrase."""
LORA_TARGETS = ("lora", *SERVERS)
"""Those that are given one LoRA, whatever the configuration has."""


def becomes_lora(method: str) -> bool:
    """Return whether an export can make a LoRA of a method's adapters on linear layers without a bias."""
    specification = method_spec(method)
    return "linear" in specification.kinds and not specification.needs_bias and METHODS[method].is_mergeable


def layout_of(target: str, by_method: Mapping[str, Placement]) -> Layout:
    """Return the layout of a target's folder."""
    if target == "merged":
        return "merged"
    return "mixed" if target == "autopeft" else adapter_layout(by_method)


def possible_targets(backbone: Backbone, configuration: Configuration) -> list[str]:
    """Return the targets that are known to take a configuration.

    Where other methods than LoRA sit on layers with a bias, only the conversion finds out if they change it.
    """
    layout, exported = _layout(backbone, configuration), as_exported(configuration)
    shapes = [backbone.shape(site) for site, adapter in exported if adapter.method != "lora"]
    is_lora = all(shape.kind == "linear" and not shape.bias for shape in shapes)
    return [
        target
        for target in TARGETS
        if _obstacle(target, backbone, configuration, layout) is None
        and (is_lora or target not in LORA_TARGETS)
    ]


def resolved_target(target: str | None, backbone: Backbone, configuration: Configuration) -> str:
    """Return the target, the default one for None.

    Raises:
        ValueError: There is no such target, or it cannot take the configuration; the message says which do.
    """
    layout = _layout(backbone, configuration)
    if target is not None:
        check_choice("target", TARGETS, target)
    if not len(configuration) and not backbone.head:
        raise ValueError("Nothing was trained: the untrained model is the base model itself.")
    if target is None:
        return "peft" if layout == "peft" else "autopeft"
    if why := _obstacle(target, backbone, configuration, layout):
        others = ", ".join(map(repr, possible_targets(backbone, configuration)))
        raise ValueError(f"Cannot export for {target!r}: {why}. Targets that take it: {others}.")
    return target


def _layout(backbone: Backbone, configuration: Configuration) -> Layout:
    return adapter_layout(placements(as_exported(configuration), backbone.sites))


def _obstacle(target: str, backbone: Backbone, configuration: Configuration, layout: Layout) -> str | None:
    """Say why a target cannot take a configuration."""
    if target == "autopeft":
        return None
    methods = ", ".join(configuration.methods) or "a head alone"
    if target in ("peft", COMPARISON) and layout != "peft":
        return f"one peft config holds one family with one set of options, this is {methods}"
    from_data = [name for name in configuration.methods if isinstance(METHODS[name], LoraFromData)]
    if target == COMPARISON and from_data:
        return f"{from_data[0]!r} starts from data, and the comparison trains from a config alone"
    if target == COMPARISON and any(B_RATE in dict(adapter.options) for _, adapter in configuration):
        return "its settings have one learning rate, none of its own for B of a LoRA (b_rate)"
    if target in SERVERS or target == COMPARISON:
        auto_class = backbone.auto_class.__name__
        if auto_class != "AutoModelForCausalLM":
            return f"it is for causal language models, this is an {auto_class}"
        if backbone.head:
            return f"it takes no trained head ({', '.join(backbone.head)})"
    if target in SERVERS:
        architecture = type(backbone.model).__name__
        if architecture not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            return f"servers are known to adapt {known}, this is a {architecture}"
        if any(site.kind == "experts" for site in configuration.adapters):
            return "servers have other names for LoRA on experts"
    if target in ("peft", COMPARISON):
        return None
    if others := [f"{site} ({adapter.method})" for site, adapter in unmergeable(configuration)]:
        return f"no weight can take in {', '.join(others)}, which compute something of their own"
    if target != "merged" and not len(configuration):
        return "there is a head alone, and no adapter"
    return None
