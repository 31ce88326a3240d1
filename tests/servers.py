"""What servers make of a folder of LoRA, written after their loaders and not after ours.

Each function does what the named files do: which keys of the config and which names of tensors it heeds, what
it does not load, what it stacks, and by what it multiplies. It returns what is added to the weight of each
linear layer of the server's own model, in which query, key and value are one layer, as are gate and up, but
not in llama.cpp. A name that its model has no layer for adds nothing, as there.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Updates = dict[str, Tensor]

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""`packed_modules_mapping` of vLLM's Llama and its kin, and what SGLang's have in the same layers."""
SGLANG_KNOWS = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "out_proj", "in_proj", "up_proj"} | {
    "fused_qkv_a_proj_with_mqa",
    "q_b_proj",
    "kv_b_proj",
    "embed_tokens",
    "lm_head",
}
"""Of sglang/srt/lora/utils.py's `_KNOWN_LORA_TARGET_MODULES`, those of more than one architecture."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return a model's linear layers, the output layer apart."""
    modules = model.named_modules()
    return {name: each for name, each in modules if isinstance(each, nn.Linear) and name != "lm_head"}


def served_layers(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers of vLLM's and SGLang's models, each with those of transformers' that it holds."""
    layers: dict[str, list[str]] = {}
    for name in linear_layers(model):
        parent, _, leaf = name.rpartition(".")
        packed = next((packed for packed, parts in PACKED.items() if leaf in parts), leaf)
        parts = PACKED[packed] if packed != leaf else (leaf,)
        layers[f"{parent}.{packed}"] = [f"{parent}.{part}" for part in parts]
    return layers


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def by_vllm(folder: Path, model: nn.Module, largest_rank: int) -> Updates:
    """vllm/lora: peft_helper.py, utils.py, lora_model.py and model_manager.py."""
    config, tensors = read(folder)
    if config["r"] > largest_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {largest_rank}.")
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError("vLLM takes no modules_to_save, DoRA or bias.")
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    layers, served = linear_layers(model), served_layers(model)
    expected = {name.rpartition(".")[2] for name in (*layers, *served)}
    loras: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
            raise ValueError(f"{name} is unsupported LoRA weight")
        module = parts[2:-2] if name.startswith("base_model.model.") else parts[:-2]
        if module[-1] not in expected:
            raise ValueError(f"expected target modules in {expected} but received {module[-1]}")
        loras[".".join(module)][parts[-2]] = tensor

    def added(part: str) -> Tensor:
        a = torch.zeros(largest_rank, layers[part].in_features)
        b = torch.zeros(layers[part].out_features, largest_rank)
        if part in loras:  # into buffers of the largest rank, the rest of which is zeros
            lora = loras[part]
            a[: len(lora["lora_A"])] = lora["lora_A"]
            b[:, : lora["lora_B"].shape[1]] = lora["lora_B"] * (config["lora_alpha"] / divisor)
        return b @ a

    return {name: torch.cat([added(part) for part in parts]) for name, parts in served.items()}


def by_sglang(folder: Path, model: nn.Module) -> Updates:
    """sglang/srt/lora: lora_config.py, lora.py (`normalize_…`), utils.py, mem_pool.py."""
    config, tensors = read(folder)
    rank, scaling = config["r"], config["lora_alpha"] / config["r"]  # rsLoRA is not heeded
    assert isinstance(config["target_modules"], list), "Only 'all' or 'all-linear' can be used as a string."
    stacked = {part: packed for packed, parts in PACKED.items() for part in parts}
    leaves = {name.split(".")[-1] for name in config["target_modules"]}
    targets = {stacked.get(leaf, leaf) for leaf in leaves}
    if not targets <= SGLANG_KNOWS:
        raise ValueError(f"{targets - SGLANG_KNOWS} are no modules that LoRA is supported on.")
    blocks: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if found := re.search(r"layers\.(\d+)\.", name):
            blocks[int(found[1])][name] = tensor
    buffers: dict[str, Tensor] = {}
    for block in blocks.values():
        _stack_query_key_value(block)
        _stack_gate_up(block)
        for name, tensor in block.items():
            if not any(target in name for target in targets):
                raise ValueError(f"Cannot find target module name for {name} in {targets}")
            buffers[name.removeprefix("base_model.model.").removesuffix(".weight")] = tensor
    layers, updates = linear_layers(model), {}
    for name, parts in served_layers(model).items():
        # Where transformers has one layer for all, they share one A, which was repeated above.
        count = len(PACKED.get(name.rpartition(".")[2], (name,)))
        heights = [layers[part].out_features for part in parts]
        width = layers[parts[0]].in_features
        a = buffers.get(f"{name}.lora_A", torch.zeros(count * rank, width))
        b = buffers.get(f"{name}.lora_B", torch.zeros(sum(heights), rank))
        if a.shape != (count * rank, width) or b.shape != (sum(heights), rank):
            raise AssertionError(f"LoRA buffer shape does not match weight shape {a.shape}, {b.shape}.")
        slices = zip(b.split(heights), a.split(rank), strict=len(parts) > 1)
        updates[name] = scaling * torch.cat([rows @ columns for rows, columns in slices])
    return updates


def _stack_query_key_value(block: dict[str, Tensor]) -> None:
    has_key = any("k_proj" in name for name in block)
    for name in list(block):
        if "q_proj" in name:
            key, value = name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")
            middle = block[key] if has_key else torch.zeros_like(block[value])
            block[name.replace("q_proj", "qkv_proj")] = torch.cat([block[name], middle, block[value]])
            for taken in (name, key, value):
                block.pop(taken, None)
        elif "qkv_proj" in name and "lora_A" in name:
            block[name] = block[name].repeat(3, 1)


def _stack_gate_up(block: dict[str, Tensor]) -> None:
    for name in list(block):
        if "gate_proj" in name:
            up = block.pop(name.replace("gate_proj", "up_proj"), torch.zeros_like(block[name]))
            block[name.replace("gate_proj", "gate_up_proj")] = torch.cat([block.pop(name), up])
        elif "gate_up_proj" in name and "lora_A" in name:
            block[name] = block[name].repeat(2, 1)


def by_llama_cpp(folder: Path, model: nn.Module) -> Updates:
    """convert_lora_to_gguf.py, then `llama_adapter_lora_weight::get_scale` in src/llama-adapter.h."""
    config, tensors = read(folder)
    pairs: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        if found is None:
            raise ValueError(f"Unexpected name '{name}': Not a lora_A or lora_B tensor")
        pairs[found[1].replace("base_model.model.", "")][found[2]] = tensor
    updates = {}
    for name, layer in linear_layers(model).items():
        updates[name] = torch.zeros(layer.out_features, layer.in_features)
        if pair := pairs.pop(name, None):
            updates[name] = config["lora_alpha"] / pair["B"].shape[1] * pair["B"] @ pair["A"]
    if pairs:
        raise ValueError(f"Can not map tensor {min(pairs)!r}")
    return updates


def in_served_layers(updates: Mapping[str, Tensor], model: nn.Module) -> Updates:
    """Return the updates of transformers' layers as those of vLLM's and SGLang's."""
    return {
        name: torch.cat([updates[part] for part in parts]) for name, parts in served_layers(model).items()
    }


RULES: Mapping[str, Callable[[Path, nn.Module], Updates]] = {
    "vllm": lambda folder, model: by_vllm(folder, model, largest_rank=64),
    "sglang": by_sglang,
    "llama.cpp": by_llama_cpp,
}
