"""Exports for servers: what these compute by their own loaders, what they refuse, how they are started."""

from __future__ import annotations

import dataclasses
import html
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.export import load_adapter
from autopeft.export.folder_format import Manifest
from autopeft.export.model_card import servers
from autopeft.export.serving import SERVERS
from autopeft.export.targets import possible_targets
from autopeft.export.verification import check_export
from autopeft.methods.lora import lora_scaling
from autopeft.models.backbone import Backbone
from autopeft.search_prior import earlier_fronts
from tests.export.test_targets import language_backbone
from tests.exports import TOLERANCE, State, difference, expected_logits, export, lora_of_many_ranks, trained
from tests.servers import RULES, Updates, by_vllm, in_served_layers, linear_layers
from tests.tiny_models import everywhere, tiny_batch


def trained_updates(backbone: Backbone, configuration: Configuration, state: State) -> Updates:
    """Return what training adds to each of transformers' linear layers, zeros where it has no adapter."""
    layers = linear_layers(backbone.model)
    updates = {name: torch.zeros(each.out_features, each.in_features) for name, each in layers.items()}
    for site, adapter in configuration:
        down, up = (state[f"{site}.lora.lora_{letter}.weight"] for letter in "AB")
        updates[backbone.shape(site).module] = lora_scaling(adapter) * up @ down
    return updates


def some(backbone: Backbone, roles: set[str]) -> Configuration:
    """Return LoRA of several ranks on some of the linear layers, with and without rsLoRA."""
    adapters = {
        site: Adapter("lora", 2 + index % 3, {"rslora": bool(index % 2), "alpha": 3 + index})
        for index, site in enumerate(everywhere(backbone, "lora").adapters)
        if site.role in roles and site.block != 1
    }
    return Configuration(adapters)


@pytest.mark.parametrize(
    ("architecture", "roles"),
    [
        ("llama", {"query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down"}),
        ("llama", {"key", "ffn_gate"}),
        ("llama", {"query", "value", "ffn_up"}),
        ("phi3", {"qkv", "ffn_gate_up", "ffn_down"}),
    ],
)
@pytest.mark.parametrize("target", SERVERS)
def test_servers_compute_what_was_trained(
    target: str, architecture: str, roles: set[str], tmp_path: Path
) -> None:
    backbone = language_backbone(architecture)
    configuration = some(backbone, roles)
    assert {site.role for site in configuration.adapters} == roles
    report = export(backbone, configuration, tmp_path / "out", target=target)
    assert report.conversion is None
    assert f"as {target} reads it" in report.checked
    expected = trained_updates(backbone, configuration, trained(backbone, configuration))
    if target != "llama.cpp":
        expected = in_served_layers(expected, backbone.model)
    found = RULES[target](tmp_path / "out", backbone.model)
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, msg=name)


@pytest.mark.parametrize("target", SERVERS)
def test_what_a_server_would_read_otherwise_is_found_out(target: str, tmp_path: Path) -> None:
    """A folder that is right in peft, by its patterns: the rules of tests and exports both refuse it."""
    backbone, folder = language_backbone(), tmp_path / "out"
    configuration = lora_of_many_ranks(backbone)
    export(backbone, configuration, folder)
    expected, manifest = expected_logits(backbone, configuration), Manifest.load(folder)
    check_export(folder, manifest, backbone, tiny_batch(), expected)
    with pytest.raises(RuntimeError, match=rf"as {target} reads it|load in {target}"):
        check_export(folder, manifest, backbone, tiny_batch(), expected, server=target)
    updates = trained_updates(backbone, configuration, trained(backbone, configuration))
    served = updates if target == "llama.cpp" else in_served_layers(updates, backbone.model)
    try:
        found = RULES[target](folder, backbone.model)
    except (KeyError, AssertionError, ValueError, RuntimeError):  # it does not load there
        return
    assert any(not torch.allclose(found[name], update) for name, update in served.items())


def test_sglang_is_given_all_that_it_stacks_and_peft_computes_the_same(tmp_path: Path) -> None:
    backbone, folder = language_backbone(), tmp_path / "out"
    sites = {Site(0, "value"): Adapter("lora", 4), Site(1, "ffn_gate"): Adapter("lora", 2)}
    configuration = Configuration(sites)
    report = export(backbone, configuration, folder, target="sglang")
    assert report._repr_html_() == f"<pre>{html.escape(str(report))}</pre>"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].partition("layers.")[2] for name in tensors} == {
        *("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"),
        *("1.mlp.gate_proj", "1.mlp.up_proj"),
    }
    assert {tensor.shape["lora_B" in name] for name, tensor in tensors.items()} == {4}
    loaded = load_adapter(language_backbone().model, folder)
    assert difference(loaded, tiny_batch(), expected_logits(backbone, configuration)) <= TOLERANCE
    assert "| adapters of zeros | 3, as sglang wants" in (folder / "README.md").read_text()
    (member,) = earlier_fronts([folder], tmp_path)[0].members
    assert member.configuration == configuration, "a prior begins from what was found"
    export(backbone, configuration, folder, target="vllm", overwrite=True)
    alone, without = Manifest.load(folder), r"without LoRA are model\.layers\.0\.self_attn\.q_proj"
    with pytest.raises(RuntimeError, match=f"not load in sglang.*{without}"):
        check_export(folder, alone, backbone, tiny_batch(), torch.zeros(1), server="sglang")


NOT_SERVED = ("bloom", "falcon", "gpt2", "gpt_neox", "jamba", "mamba", "mpt", "opt", "rwkv")


@pytest.mark.parametrize("architecture", NOT_SERVED)
def test_architectures_that_a_server_does_not_adapt_are_refused(architecture: str, tmp_path: Path) -> None:
    backbone = language_backbone(architecture)
    configuration = everywhere(backbone, "lora")
    assert set(SERVERS).isdisjoint(possible_targets(backbone, configuration))
    name = type(backbone.model).__name__
    with pytest.raises(ValueError, match=rf"'vllm': .* LlamaForCausalLM.* this is a {name}\. .*'lora'"):
        export(backbone, configuration, tmp_path / "out", target="vllm")


@pytest.mark.parametrize("architecture", ["cohere", "gemma2", "llama", "phi3", "qwen3"])
def test_architectures_that_servers_adapt_have_no_other_linear_layers(architecture: str) -> None:
    backbone = language_backbone(architecture)
    configuration = everywhere(backbone, "lora")
    assert set(SERVERS) <= set(possible_targets(backbone, configuration))
    names = {backbone.shape(site).module.rpartition(".")[2] for site in configuration.adapters}
    assert names <= {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"} | {
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    }


@pytest.mark.parametrize(("rank", "enough"), [(3, 8), (9, 16), (300, 320)])
def test_vllm_is_started_for_a_rank_that_it_knows(rank: int, enough: int, tmp_path: Path) -> None:
    backbone = language_backbone()
    configuration = Configuration({Site(0, "query"): Adapter("lora", rank)})
    report = export(backbone, configuration, tmp_path / "out", target="vllm", base="a/b", verify=False)
    command = shlex.split(report.servers.splitlines()[-1])
    assert command[:4] == ["vllm", "serve", "a/b", "--enable-lora"]
    assert command[4:] == ["--max-lora-rank", str(enough), "--lora-modules", f"out={tmp_path / 'out'}"]
    by_vllm(tmp_path / "out", backbone.model, largest_rank=enough)


def test_a_rank_that_vllm_has_no_room_for_is_refused(tmp_path: Path) -> None:
    backbone = language_backbone()
    configuration = Configuration({Site(0, "query"): Adapter("lora", 600)})
    with pytest.raises(ValueError, match=r"'vllm': its largest rank is 512, .* 600. .*target='merged'"):
        export(backbone, configuration, tmp_path / "out", target="vllm")


@pytest.mark.parametrize("target", SERVERS)
def test_paths_are_quoted_in_commands_and_not_on_the_card(target: str, tmp_path: Path) -> None:
    base, folder = tmp_path / "private" / "a base", tmp_path / "my; adapters"
    base.mkdir(parents=True)
    backbone = language_backbone()
    lora = everywhere(backbone, "lora")
    report = export(backbone, lora, folder, target=target, base=str(base), verify=False)
    shell = [word for line in report.servers.splitlines()[2:] for word in shlex.split(line)]
    assert {str(base), str(folder)} <= {*shell, *(word.partition("=")[2] for word in shell)}
    card = (folder / "README.md").read_text()
    assert "'path/to/a base'" in card
    assert "--remote" not in card
    assert str(tmp_path) not in card


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("quantization", [None, NF4, {"load_in_8bit": True}])
@pytest.mark.parametrize("target", SERVERS)
def test_a_base_that_was_quantised_is_served_so_or_said_to_be_another(
    target: str, quantization: Any, tmp_path: Path
) -> None:
    backbone = language_backbone()
    configuration = everywhere(backbone, "lora")
    export(backbone, configuration, tmp_path / "out", target=target, verify=False)
    manifest = dataclasses.replace(Manifest.load(tmp_path / "out"), base="a/b", quantization=quantization)
    text = servers(target, manifest, "out", configuration, ())
    is_packed = target == "vllm" and quantization is NF4
    assert ("vllm serve a/b --quantization bitsandbytes --enable-lora" in text) == is_packed
    assert ("unquantised, it was not checked" in text) == (quantization is not None and not is_packed)
