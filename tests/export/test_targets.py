"""What an export is for: what each target takes, and that servers compute what was trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.export import load_adapter
from autopeft.export.folder_format import Manifest
from autopeft.export.verification import check_export
from autopeft.methods import count_parameters
from autopeft.methods.lora import lora_scaling
from autopeft.models.backbone import Backbone
from tests.exports import (
    TOLERANCE,
    difference,
    expected_logits,
    export,
    lora_of_many_ranks,
    trained,
)
from tests.tiny_models import (
    everywhere,
    tiny_backbone,
    tiny_batch,
    tiny_language_model,
    tiny_tokenizer,
)


def language_backbone(architecture: str = "llama") -> Backbone:
    model, auto_class = tiny_language_model(architecture), AutoModelForCausalLM
    return Backbone(model, tiny_tokenizer(), name="tiny", head=(), auto_class=auto_class)


def by_vllm(config: Mapping[str, float], down: Tensor, up: Tensor) -> Tensor:
    """vLLM and SGLang: one rank and one alpha for all modules, patterns are not read."""
    return up @ down * (config["lora_alpha"] / config["r"])


def by_llama_cpp(config: Mapping[str, float], down: Tensor, up: Tensor) -> Tensor:
    """llama.cpp: one alpha, divided by the rank of each tensor."""
    return up @ down * (config["lora_alpha"] / len(down))


@pytest.mark.parametrize(
    ("target", "rule"), [("vllm", by_vllm), ("sglang", by_vllm), ("llama.cpp", by_llama_cpp)]
)
def test_servers_compute_what_was_trained(target: str, rule: Callable[..., Tensor], tmp_path: Path) -> None:
    backbone = language_backbone()
    configuration = lora_of_many_ranks(backbone)
    site = next(iter(configuration.adapters))
    adapters: dict[Site, Any] = {**configuration.adapters, site: Adapter("lora", 3, {"rslora": False})}
    configuration = Configuration(adapters)
    state = trained(backbone, configuration)
    report = export(backbone, configuration, tmp_path / "out", target=target)
    assert report.conversion is None
    assert f"as {target} reads it" in report.checked
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for place, adapter in configuration:
        stem = f"base_model.model.{backbone.shape(place).module}"
        found = rule(config, *(tensors[f"{stem}.lora_{letter}.weight"] for letter in "AB"))
        down, up = (state[f"{place}.lora.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(found, lora_scaling(adapter) * up @ down)


@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
def test_what_a_server_would_read_otherwise_is_found_out(server: str, tmp_path: Path) -> None:
    backbone = language_backbone()
    configuration = lora_of_many_ranks(backbone)
    folder = tmp_path / "out"
    export(backbone, configuration, folder)  # right in peft, by its patterns
    expected, manifest = expected_logits(backbone, configuration), Manifest.load(folder)
    check_export(folder, manifest, backbone, tiny_batch(), expected)
    with pytest.raises(RuntimeError, match=f"as {server} reads it"):
        check_export(folder, manifest, backbone, tiny_batch(), expected, server=server)


@pytest.mark.parametrize(("rank", "enough"), [(3, 8), (9, 16), (300, 320)])
def test_vllm_is_started_for_a_rank_that_it_knows(rank: int, enough: int, tmp_path: Path) -> None:
    backbone = language_backbone()
    configuration = Configuration({Site(0, "query"): Adapter("lora", rank)})
    report = export(backbone, configuration, tmp_path / "out", target="vllm", base="a/b", verify=False)
    assert f"vllm serve a/b --enable-lora --max-lora-rank {enough} " in report.servers
    assert f"--lora-modules out={tmp_path / 'out'}" in report.servers


def test_a_card_has_no_path_of_this_machine(tmp_path: Path) -> None:
    base, folder = tmp_path / "private" / "base", tmp_path / "out"
    backbone = language_backbone()
    report = export(
        backbone, everywhere(backbone, "lora"), folder, target="sglang", base=str(base), verify=False
    )
    assert f"--model-path {base} --lora-paths out={folder}" in report.servers
    card = (folder / "README.md").read_text()
    assert "--model-path path/to/base --lora-paths out=out" in card
    assert str(tmp_path) not in card


def test_a_rank_that_vllm_has_no_room_for_is_refused(tmp_path: Path) -> None:
    backbone = language_backbone()
    configuration = Configuration({Site(0, "query"): Adapter("lora", 600)})
    with pytest.raises(ValueError, match=r"'vllm': its largest rank is 512, .* 600. .*target='merged'"):
        export(backbone, configuration, tmp_path / "out", target="vllm")


LORA, IA3 = Adapter("lora", 2), Adapter("ia3")
SITE = Site(0, "query")


@pytest.mark.parametrize(
    ("head", "sites", "target", "expected"),
    [
        (False, {SITE: LORA}, "vlm", "Unknown target 'vlm'.*did you mean 'vllm'"),
        (
            False,
            {SITE: LORA, Site(1, "value"): IA3},
            "peft",
            "this is lora, ia3. Targets that take it: 'autopeft', 'merged', 'lora', 'vllm'",
        ),
        (
            False,
            {Site(0, "attention"): Adapter("prefix", 2)},
            "lora",
            r"no weight can take in 0\.attention \(prefix\).* take it: 'autopeft'\.$",
        ),
        (True, {SITE: LORA}, "vllm", "is an AutoModelForSeq.*: 'peft', 'autopeft', 'merged', 'lora'"),
        (True, {}, "lora", "a head alone, and no adapter.*: 'autopeft', 'merged'"),
        (True, {}, "peft", "this is a head alone.*'autopeft'"),
        (
            False,
            {Site(0, "ffn_norm"): Adapter("layernorm")},
            "lora",
            "0.ffn_norm: it changes a norm.*'merged'",
        ),
        (True, {SITE: [LORA, Adapter("bitfit")]}, "lora", "bitfit at 0.query: it changes the bias"),
        (False, {SITE: LORA, Site(1, "value"): IA3}, "peft-method-comparison", "this is lora, ia3"),
        (True, {SITE: LORA}, "peft-method-comparison", "causal language models"),
    ],
)
def test_what_a_target_cannot_take_is_refused_with_one_that_can(
    head: bool, sites: dict[Site, Any], target: str, expected: str, tmp_path: Path
) -> None:
    backbone = tiny_backbone("bert") if head else language_backbone()
    with pytest.raises(ValueError, match=expected):
        export(backbone, Configuration(sites), tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


def test_a_plain_lora_can_be_a_folder_of_autopeft(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "lora")
    report = export(backbone, configuration, tmp_path / "out", target="autopeft")
    assert {"lora/adapter_config.json", "head.safetensors"} <= set(report.files)
    loaded = load_adapter(copy.deepcopy(backbone.model), tmp_path / "out")
    assert difference(loaded, tiny_batch(), expected_logits(backbone, configuration)) <= TOLERANCE


def test_an_experiment_of_peft_s_comparison_is_a_config_and_settings(tmp_path: Path) -> None:
    backbone = language_backbone()
    sites = everywhere(backbone, "hira").adapters
    configuration = Configuration(sites, learning_rate=1e-3, weight_decay=0.1)
    folder = tmp_path / "out"
    report = export(backbone, configuration, folder, target="peft-method-comparison")
    assert report.files == ("adapter_config.json", "training_params.json")
    config = PeftConfig.from_pretrained(str(folder))
    assert not config.inference_mode
    assert config.peft_type == "HIRA"
    assert f"{count_parameters(backbone, configuration):,} parameters" in report.checked
    settings = json.loads((folder / "training_params.json").read_text())
    assert settings == {"dtype": "float32", "optimizer_kwargs": {"lr": 15e-3, "weight_decay": 0.1}}
    export(backbone, configuration, folder, target="peft", overwrite=True, verify=False)
