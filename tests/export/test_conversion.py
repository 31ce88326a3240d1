"""One plain LoRA made of other methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.export.conversion import plain_lora
from autopeft.export.verification import trained_logits
from autopeft.methods.lora import lora_tensors
from autopeft.models.backbone import Backbone
from tests.exports import TOLERANCE, difference, expected_logits, export, trained
from tests.tiny_models import everywhere, fingerprint, places, tiny_backbone, tiny_batch

METHODS = ("lora", "hira", "ia3", "miss", "pissa", "dora")


def mixture(backbone: Backbone) -> Configuration:
    """Return a configuration whose every method changes weights alone: the backbone has no biases."""
    adapters = [everywhere(backbone, method).adapters for method in METHODS]
    sites = places(backbone, "lora")
    return Configuration({site: adapters[index % len(METHODS)][site] for index, site in enumerate(sites)})


def products(state: dict[str, Tensor], site: Site) -> Tensor:
    down, up = (state[name] for name in lora_tensors(site))
    return up @ down


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_lora_stands_for_whatever_changes_weights(architecture: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(architecture)
    methods = mixture(backbone) if architecture == "llama" else everywhere(backbone, "hira")
    before = fingerprint(backbone.model)
    expected = expected_logits(backbone, methods)
    report = export(backbone, methods, tmp_path / "out", target="lora", energy=1.0)
    assert report.kind == "a plain PEFT folder, the trained head included"
    assert report.conversion is not None
    assert min(report.conversion.energy_kept.values()) > 1 - 1e-6
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone.model), str(tmp_path / "out")).eval()
    assert {config.peft_type for config in loaded.peft_config.values()} == {"LORA"}
    assert difference(loaded, tiny_batch(), expected) <= 10 * TOLERANCE
    assert fingerprint(backbone.model) == before


@pytest.mark.parametrize("target", ["peft", pytest.param("lora", marks=pytest.mark.slow)])
def test_what_starts_from_data_is_exported_as_lora_without_loss(target: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    names = ("lora", "eva", "lora_ga", "corda")
    adapters = {
        site: Adapter(names[index % 4], 2 + index % 3) for index, site in enumerate(places(backbone, "lora"))
    }
    configuration = Configuration(adapters)
    expected = expected_logits(backbone, configuration)
    report = export(backbone, configuration, tmp_path / "out", target=target)
    assert report.conversion is None
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone.model), str(tmp_path / "out")).eval()
    assert {config.peft_type for config in loaded.peft_config.values()} == {"LORA"}
    assert difference(loaded, tiny_batch(), expected) <= TOLERANCE
    assert "lora, eva, lora_ga, corda" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="'eva' starts from data, and the comparison trains from a config"):
        export(backbone, configuration, tmp_path / "other", target="peft-method-comparison")


def test_less_energy_is_a_smaller_rank_and_the_card_says_what_it_costs(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    configuration = everywhere(backbone, "hira")
    state = trained(backbone, configuration)
    half, most = (plain_lora(backbone, configuration, state, energy) for energy in (0.5, 0.9))
    for plain, energy in ((half, 0.5), (most, 0.9)):
        assert all(energy <= kept < 1 for kept in plain.energy_kept.values())
    ranks = [[adapter.size for _, adapter in plain.configuration] for plain in (half, most)]
    assert all(few < many for few, many in zip(*ranks, strict=True))

    scores = iter([{"accuracy": 0.9}, {"accuracy": 0.85}, {"accuracy": 0.8}])
    report = export(
        backbone, configuration, tmp_path / "out", target="lora", energy=0.5, score=lambda *_: next(scores)
    )
    assert "accuracy 0.9000 as trained, 0.8500 as LoRA" in str(report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "accuracy 0.9000 as trained, 0.8500 as LoRA" in card
    assert "| accuracy | test | 0.8000 |" in card
    site, kept = next(iter(half.energy_kept.items()))
    assert f"| {site} | {ranks[0][0]} | {kept:.4f} |" in card


@pytest.mark.parametrize("method", ["loha", "miss"])
def test_agrees_with_peft_s_own_conversion(method: str, tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, method, 2)
    export(backbone, configuration, tmp_path / "out", verify=False)
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), str(tmp_path / "out"))
    _, theirs = convert_to_lora(model, rank=0.9)
    plain = plain_lora(backbone, configuration, trained(backbone, configuration), 0.9)
    for site, adapter in plain.configuration:
        stem = f"base_model.model.{backbone.shape(site).module}"
        down, up = (theirs[f"{stem}.lora_{letter}.weight"] for letter in "AB")
        if method == "miss":  # which peft converts whole: ours keeps less
            assert (adapter.size or 0) <= len(down)
        else:
            assert adapter.size == len(down)
            torch.testing.assert_close(products(dict(plain.state), site), up @ down, atol=1e-4, rtol=1e-3)


def test_updates_on_a_base_of_low_precision_are_not_rounded_with_its_weights() -> None:
    backbone = tiny_backbone("llama")
    backbone.model.bfloat16()
    configuration = everywhere(backbone, "hira")
    state = {name: 1e-2 * tensor for name, tensor in trained(backbone, configuration).items()}
    plain = plain_lora(backbone, configuration, state, 1.0)
    assert {tensor.dtype for name, tensor in plain.state.items() if "lora" in name} == {torch.float32}
    site = next(iter(plain.configuration.adapters))
    weight = backbone.model.get_parameter(f"{backbone.shape(site).module}.weight").float()
    down, up = (state[f"{site}.hira.hira_{letter}"] for letter in "AB")
    torch.testing.assert_close(products(dict(plain.state), site), weight * (up @ down), atol=1e-7, rtol=1e-2)


@pytest.mark.parametrize("energy", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(energy: float) -> None:
    backbone = tiny_backbone("llama")
    configuration = everywhere(backbone, "hira")
    with pytest.raises(ValueError, match=r"energy is the share .* got"):
        plain_lora(backbone, configuration, trained(backbone, configuration), energy)


def test_an_adapter_that_adds_nothing_is_a_lora_that_adds_nothing() -> None:
    backbone = tiny_backbone("llama")
    configuration = Configuration({Site(0, "query"): Adapter("hira", 2)})
    state: dict[str, Any] = {name: 0 * tensor for name, tensor in trained(backbone, configuration).items()}
    plain = plain_lora(backbone, configuration, state)
    assert plain.energy_kept == {Site(0, "query"): 1.0}
    found = trained_logits(backbone, plain.configuration, plain.state, tiny_batch())
    assert torch.equal(found, trained_logits(backbone, configuration, state, tiny_batch()))
