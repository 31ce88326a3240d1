"""How servers read a folder of LoRA: by rules of their own, which differ from peft's.

peft scales each module by its own α/r. vLLM and SGLang take one rank and one α for all modules, and drop
peft's patterns or refuse them; llama.cpp divides one α by the rank of each tensor. SGLang also stacks the
modules that it computes at once, and wants all of them. None takes a trained head.

Read in vllm/lora (peft_helper.py, lora_model.py, model_manager.py), sglang/srt/lora (lora.py, mem_pool.py,
utils.py) and llama.cpp (convert_lora_to_gguf.py), in November 2026.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.folder_format import PEFT_CONFIG_FILE, PEFT_FILE, PEFT_PREFIX, Manifest
from autopeft.methods.lora import lora_tensors
from autopeft.models.site_shapes import SiteShape

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM accepts as --max-lora-rank."""
ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        *("Cohere", "Gemma", "Gemma2", "Gemma3", "Granite", "Llama", "Mistral", "Mixtral"),
        *("Olmo2", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe"),
    )
)
"""Those that all of the servers adapt: marked for LoRA in vLLM's docs/models/supported_models.md, in
sglang/srt/models with linear layers of names that sglang/srt/lora/utils.py knows, and in llama.cpp's
conversion/. A server may adapt more."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server reads a folder, and how it is started with one."""

    # By what it multiplies a module's B·A, from peft's config and the rank of the module's tensors.
    scaling: Callable[[Mapping[str, Any], int], float]
    # Shell commands, with the fields base, folder, file (of GGUF), adapter (name=folder), rank, quantized;
    # local and remote are what llama.cpp's converters want before a base in a folder and one of the hub.
    commands: str
    ranks: tuple[int, ...] = ()  # the largest ranks it can be started for; empty where any will do
    # Names of modules whose A and B, each of the config's rank, it stacks: some alone do not load.
    stacked: tuple[tuple[str, ...], ...] = ()
    quantizes: str = ""  # what its command takes to load a base as quantization="nf4" does


SERVERS: Mapping[str, Server] = {
    "vllm": Server(
        scaling=lambda config, rank: (
            config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
        ),
        commands="vllm serve {base} {quantized}--enable-lora --max-lora-rank {rank} --lora-modules {adapter}",
        ranks=VLLM_RANKS,
        quantizes="--quantization bitsandbytes ",  # NF4 with double quantisation: bitsandbytes_loader.py
    ),
    "sglang": Server(
        scaling=lambda config, rank: config["lora_alpha"] / config["r"],
        commands="python -m sglang.launch_server --model-path {base} --lora-paths {adapter}",
        stacked=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    ),
    "llama.cpp": Server(
        scaling=lambda config, rank: config["lora_alpha"] / rank,
        # Both scripts are in llama.cpp's repository; the first reads no weights of the base.
        commands="python convert_lora_to_gguf.py {folder} {local}--outfile {file}\n"
        "python convert_hf_to_gguf.py {remote}{base} --outfile base.gguf\n"
        "llama-server --model base.gguf --lora {file}",
    ),
}


def how_to_serve(target: str, manifest: Manifest, folder: str, configuration: Configuration) -> str:
    """Return the shell commands that serve an exported folder, and what in them differs from the check."""
    server, rank, name = SERVERS[target], largest_rank(configuration), Path(folder).name
    enough = min((each for each in server.ranks if each >= rank), default=rank)
    is_on_hub = bool(manifest.base) and manifest.base.count("/") < 2 and not Path(manifest.base).is_dir()
    base, quantization = quote(manifest.base or "BASE"), manifest.quantization or {}
    quantized = server.quantizes if quantization.get("bnb_4bit_quant_type") == "nf4" else ""
    commands = server.commands.format(
        base=base,
        folder=quote(folder),
        file=quote(f"{name}.gguf"),
        adapter=quote(f"{name}={folder}"),
        rank=enough,
        quantized=quantized,
        local="" if is_on_hub else f"--base {base} ",
        remote="--remote " if is_on_hub else "",
    )
    shown = "\n".join(f"    {line}" for line in commands.splitlines())
    if not quantization or quantized:
        return shown
    return (
        f"{shown}\n\nThe base was quantised by bitsandbytes in training and in the check. This serves it as "
        "it is stored: unquantised, it was not checked."
    )


def largest_rank(configuration: Configuration) -> int:
    """Return the largest rank of a configuration of LoRA alone."""
    rank: int = max(adapter.size_or_zero for _, adapter in configuration)
    return rank


def with_one_rank(
    target: str, configuration: Configuration, state: Mapping[str, Tensor], sites: Mapping[Site, SiteShape]
) -> tuple[Configuration, dict[str, Tensor]]:
    """Return the same function with one rank for all modules, which every server reads the same way.

    A and B are padded with zeros to the largest rank. Modules that the server stacks with an adapted one get
    an A and B of zeros.

    Args:
        target: The server it is for.
        configuration: A plain LoRA; see `autopeft.export.conversion`.
        state: Its tensors, as `Attachment.state_dict` gives them.
        sites: All sites of the backbone.

    Raises:
        ValueError: The server has no room for such a rank.
    """
    server, rank, padded = SERVERS[target], largest_rank(configuration), dict(state)
    most = max(server.ranks, default=rank)
    if rank > most:
        raise ValueError(
            f"Cannot export for {target!r}: its largest rank is {most}, this LoRA has {rank}. Export "
            "with target='merged', or where other methods are made LoRA with less energy."
        )
    adapted = {name for site in configuration.adapters for name in _stacked(server, sites[site].module)}
    linear = [site for site, shape in sites.items() if shape.kind == "linear" and shape.module in adapted]
    for site in linear:
        down, up = lora_tensors(site)
        a = padded.get(down, torch.zeros(0, sites[site].in_features))
        b = padded.get(up, torch.zeros(sites[site].out_features, 0))
        padded[down], padded[up] = pad(a, (0, 0, 0, rank - len(a))), pad(b, (0, rank - len(a)))
    adapters = dict.fromkeys(linear, plain_adapter(rank))
    return configuration.replace(adapters=adapters, allocation=None), padded


def _stacked(server: Server, module: str) -> list[str]:
    """Return the modules that a server stacks with one, itself among them."""
    parent, _, name = module.rpartition(".")
    group = next((names for names in server.stacked if name in names), (name,))
    return [f"{parent}.{each}" for each in group]


def plain_adapter(rank: int) -> Adapter:
    """Return a LoRA with a scale of 1."""
    return Adapter("lora", rank, {"alpha": rank, "rslora": False})


def as_served(target: str, folder: Path, manifest: Manifest) -> tuple[Configuration, dict[str, Tensor]]:
    """Return what a server makes of a folder: a LoRA with a scale of 1, its own scale folded into B.

    Raises:
        RuntimeError: The server does not load it.
    """
    server = SERVERS[target]
    config = json.loads((folder / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / PEFT_FILE)
    adapters: dict[Site, Adapter] = {}
    state: dict[str, Tensor] = {}
    for site, shape in manifest.sites.items():
        stem = f"{PEFT_PREFIX}{shape.module}.lora_"
        down, up = (tensors[f"{stem}{letter}.weight"] for letter in "AB")
        missing = [
            name
            for name in _stacked(server, shape.module)
            if f"{PEFT_PREFIX}{name}.lora_A.weight" not in tensors
        ]
        if server.stacked and (missing or len(down) != config["r"]):
            raise RuntimeError(
                f"The export does not load in {target}, which stacks modules of one rank: {shape.module} has "
                f"rank {len(down)} of {config['r']}, without LoRA are {', '.join(missing) or 'none'}."
            )
        adapters[site] = plain_adapter(len(down))
        scaled = up * server.scaling(config, len(down))
        state |= dict(zip(lora_tensors(site), (down, scaled), strict=True))
    return Configuration(adapters), state
