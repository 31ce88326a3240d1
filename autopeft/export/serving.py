"""How servers read a folder of LoRA: by rules of their own, which differ from peft's.

peft scales each module by its own α/r. vLLM and SGLang take one rank and one α for all modules, and drop
peft's patterns or refuse them; llama.cpp divides one α by the rank of each tensor. None takes a trained head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.folder_format import PEFT_CONFIG_FILE, PEFT_FILE, PEFT_PREFIX, Manifest
from autopeft.methods.lora import lora_tensors

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM accepts as --max-lora-rank."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server reads a folder, and how it is started with one."""

    # By what it multiplies a module's B·A, from peft's config and the rank of the module's tensors.
    scaling: Callable[[Mapping[str, Any], int], float]
    # Shell commands, with the fields base, folder, name and rank; local and remote are what llama.cpp's
    # converters want before a base in a folder and before one of the hub.
    commands: str
    ranks: tuple[int, ...] = ()  # the largest ranks it can be started for; empty where any will do


def _one_for_all(config: Mapping[str, Any], rank: int) -> float:
    return float(config["lora_alpha"] / config["r"])


def _by_tensor(config: Mapping[str, Any], rank: int) -> float:
    return float(config["lora_alpha"] / rank)


SERVERS: Mapping[str, Server] = {
    "vllm": Server(
        scaling=_one_for_all,
        commands="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}",
        ranks=VLLM_RANKS,
    ),
    "sglang": Server(
        scaling=_one_for_all,
        commands="python -m sglang.launch_server --model-path {base} --lora-paths {name}={folder}",
    ),
    "llama.cpp": Server(
        scaling=_by_tensor,
        # Both scripts are in llama.cpp's repository; the first reads no weights of the base.
        commands="python convert_lora_to_gguf.py {folder} {local}--outfile {name}.gguf\n"
        "python convert_hf_to_gguf.py {remote}{base} --outfile base.gguf\n"
        "llama-server --model base.gguf --lora {name}.gguf",
    ),
}


def how_to_serve(server: Server, base: str, folder: str, configuration: Configuration) -> str:
    """Return the shell commands that serve an exported folder."""
    rank = largest_rank(configuration)
    enough = min((each for each in server.ranks if each >= rank), default=rank)
    is_on_hub = bool(base) and not Path(base).is_dir()
    base = base or "BASE"
    return server.commands.format(
        base=base,
        folder=folder,
        name=Path(folder).name,
        rank=enough,
        local="" if is_on_hub else f"--base {base} ",
        remote="--remote " if is_on_hub else "",
    )


def largest_rank(configuration: Configuration) -> int:
    """Return the largest rank of a configuration of LoRA alone."""
    return max(adapter.size or 0 for _, adapter in configuration)


def with_one_rank(
    server: str, configuration: Configuration, state: Mapping[str, Tensor]
) -> tuple[Configuration, dict[str, Tensor]]:
    """Return the same function with one rank for all modules, which every server reads the same way.

    A and B are padded with zeros to the largest rank.

    Args:
        server: The one it is for.
        configuration: A plain LoRA; see `autopeft.export.conversion`.
        state: Its tensors, as `Attachment.state_dict` gives them.

    Raises:
        ValueError: The server has no room for such a rank.
    """
    rank, padded = largest_rank(configuration), dict(state)
    most = max(SERVERS[server].ranks, default=rank)
    if rank > most:
        raise ValueError(
            f"Cannot export for {server!r}: its largest rank is {most}, this LoRA has {rank}. Export "
            "with target='merged', or where other methods are made LoRA with less energy."
        )
    for site, adapter in configuration:
        missing = rank - (adapter.size or 0)
        down, up = lora_tensors(site)
        padded[down] = pad(state[down], (0, 0, 0, missing))
        padded[up] = pad(state[up], (0, missing))
    adapters = dict.fromkeys(configuration.adapters, plain_adapter(rank))
    return configuration.replace(adapters=adapters, allocation=None), padded


def plain_adapter(rank: int) -> Adapter:
    """Return a LoRA with a scale of 1."""
    return Adapter("lora", rank, {"alpha": rank, "rslora": False})


def as_served(server: Server, folder: Path, manifest: Manifest) -> tuple[Configuration, dict[str, Tensor]]:
    """Return what a server makes of a folder: a LoRA with a scale of 1, its own scale folded into B."""
    config = json.loads((folder / PEFT_CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / PEFT_FILE)
    adapters: dict[Site, Adapter] = {}
    state: dict[str, Tensor] = {}
    for site, shape in manifest.sites.items():
        stem = f"{PEFT_PREFIX}{shape.module}.lora_"
        down, up = (tensors[f"{stem}{letter}.weight"] for letter in "AB")
        adapters[site] = plain_adapter(len(down))
        scaled = up * server.scaling(config, len(down))
        state |= dict(zip(lora_tensors(site), (down, scaled), strict=True))
    return Configuration(adapters), state
