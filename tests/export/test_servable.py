"""LoRA as servers read it, by their rules stated anew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods.lora import lora_scaling
from tests.exports import export, lora_of_many_ranks, trained
from tests.tiny_models import places, tiny_backbone


def by_vllm(config: Mapping[str, float], down: Tensor, up: Tensor) -> Tensor:
    """vLLM and SGLang: one rank and one alpha for all modules, patterns are not read."""
    return up @ down * (config["lora_alpha"] / config["r"])


def by_llama_cpp(config: Mapping[str, float], down: Tensor, up: Tensor) -> Tensor:
    """llama.cpp: one alpha, divided by the rank of each tensor."""
    return up @ down * (config["lora_alpha"] / len(down))


@pytest.mark.parametrize("rule", [by_vllm, by_llama_cpp])
def test_servers_compute_what_was_trained(rule: Callable[..., Tensor], tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    configuration = lora_of_many_ranks(backbone)
    site = next(iter(configuration.adapters))
    adapters: dict[Site, Any] = {**configuration.adapters, site: Adapter("lora", 3, {"rslora": False})}
    configuration = Configuration(adapters)
    state = trained(backbone, configuration)
    report = export(backbone, configuration, tmp_path / "out", servable=True)
    assert report.max_logit_difference is not None
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert len({*config["rank_pattern"].values(), config["r"]}) == 1
    assert len({*config["alpha_pattern"].values(), config["lora_alpha"]}) == 1
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for place, adapter in configuration:
        stem = f"base_model.model.{backbone.shape(place).module}"
        found = rule(config, *(tensors[f"{stem}.lora_{letter}.weight"] for letter in "AB"))
        down, up = (state[f"{place}.lora.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(found, lora_scaling(adapter) * up @ down)


def test_other_methods_are_refused(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    site = places(backbone, "ia3")[0]
    with pytest.raises(ValueError, match="linear layers alone, this is ia3"):
        export(backbone, Configuration({site: Adapter("ia3")}), tmp_path / "out", servable=True)
    with pytest.raises(ValueError, match="choose merged=True or servable=True"):
        export(backbone, lora_of_many_ranks(backbone), tmp_path / "out", servable=True, merged=True)
