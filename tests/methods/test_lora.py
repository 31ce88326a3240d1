from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from tests.tiny_models import draw_parameters, logits_of, tiny_backbone, tiny_batch

CASES: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "rslora": ({}, 8 / math.sqrt(3)),
    "rslora-alpha": ({"alpha": 5}, 5 / math.sqrt(3)),
    "plain": ({"rslora": False}, 8 / 3),
    "plain-alpha": ({"rslora": False, "alpha": 5}, 5 / 3),
}


def _inputs(backbone: Backbone, site: Site) -> Tensor:
    return torch.randn(2, 5, backbone.shape(site).in_features)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("architecture", "role"),
    [("bert", "query"), ("llama", "value"), ("llama", "ffn_gate"), ("gpt2", "qkv"), ("gpt2", "ffn_down")],
)
@torch.no_grad()
def test_adds_the_scaled_low_rank_update(case: str, architecture: str, role: str) -> None:
    options, scale = CASES[case]
    backbone, site = tiny_backbone(architecture), Site(1, role)
    module = backbone.shape(site).module
    hidden = _inputs(backbone, site)
    before = backbone.model.get_submodule(module)(hidden)
    with attach(backbone, Configuration({site: Adapter("lora", 3, options)})) as attachment:
        down = attachment.parameters[f"{site}.lora.lora_A.weight"]
        up = attachment.parameters[f"{site}.lora.lora_B.weight"]
        assert (down.shape[0], up.shape[1]) == (3, 3)
        draw_parameters([down, up], std=0.3)
        after = backbone.model.get_submodule(module)(hidden)
        torch.testing.assert_close(after, before + scale * hidden @ down.T @ up.T)


@torch.no_grad()
def test_adapters_with_different_options_are_all_active() -> None:
    """peft holds rsLoRA and dropout once a config: such sites go in as several peft adapters."""
    backbone = tiny_backbone("bert")
    adapters = {
        Site(0, "query"): (Adapter("lora", 2), 8 / math.sqrt(2)),
        Site(0, "value"): (Adapter("lora", 5, {"alpha": 3}), 3 / math.sqrt(5)),
        Site(0, "ffn_up"): (Adapter("lora", 4, {"rslora": False}), 8 / 4),
        Site(1, "query"): (Adapter("lora", 4, {"rslora": False, "dropout": 0.5, "alpha": 6}), 6 / 4),
        Site(1, "key"): (Adapter("lora", 1, {"dropout": 0.5}), 8.0),
        Site(1, "ffn_down"): (Adapter("lora", 7, {"dropout": 0.25}), 8 / math.sqrt(7)),
    }
    inputs = {site: _inputs(backbone, site) for site in adapters}

    def outputs() -> dict[Site, Tensor]:
        return {
            site: backbone.model.get_submodule(backbone.shape(site).module)(hidden)
            for site, hidden in inputs.items()
        }

    before = outputs()
    configuration = Configuration({site: adapter for site, (adapter, _) in adapters.items()})
    with attach(backbone, configuration) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.3)
        backbone.model.eval()
        after = outputs()
        for site, (_, scale) in adapters.items():
            down = attachment.parameters[f"{site}.lora.lora_A.weight"]
            up = attachment.parameters[f"{site}.lora.lora_B.weight"]
            expected = before[site] + scale * inputs[site] @ down.T @ up.T
            torch.testing.assert_close(after[site], expected)


@torch.no_grad()
def test_every_block_gets_its_own_rank_and_alpha_in_a_deep_network() -> None:
    """Block 1's pattern must not match block 11's module."""
    backbone = tiny_backbone("bert", num_hidden_layers=12)
    configuration = Configuration(
        {
            Site(block, role): Adapter("lora", 1 + block % 5, {"alpha": 1 + block})
            for block in range(12)
            for role in ("query", "key", "ffn_up")
        }
    )
    with attach(backbone, configuration) as attachment:
        draw_parameters(attachment.parameters.values(), std=1.0)
        for site, adapter in configuration:
            layer = backbone.model.get_submodule(backbone.shape(site).module)
            down = attachment.parameters[f"{site}.lora.lora_A.weight"]
            up = attachment.parameters[f"{site}.lora.lora_B.weight"]
            assert down.shape[0] == adapter.size == 1 + site.block % 5
            hidden = _inputs(backbone, site)
            update = layer(hidden) - layer.base_layer(hidden)  # type: ignore[operator]
            scale = (1 + site.block) / math.sqrt(1 + site.block % 5)
            torch.testing.assert_close(update, scale * hidden @ down.T @ up.T, rtol=1e-4, atol=1e-3)


def test_dropout_is_on_the_adapters_input_in_training_alone() -> None:
    backbone, site = tiny_backbone("bert"), Site(0, "query")
    configuration = Configuration({site: Adapter("lora", 32, {"dropout": 0.5, "alpha": 1})})
    with attach(backbone, configuration) as attachment:
        draw_parameters(attachment.parameters.values(), std=1.0)
        layer = backbone.model.get_submodule(backbone.shape(site).module)
        hidden = torch.ones(2000, 32)
        layer.train()
        dropped = layer(hidden)
        layer.eval()
        kept = layer(hidden)
        assert dropped.std(dim=0).min() > 0
        assert kept.std(dim=0).max() < 1e-4
        # Inverted dropout keeps the mean.
        torch.testing.assert_close(dropped.mean(dim=0), kept[0], rtol=0, atol=1.0)


@torch.no_grad()
def test_every_site_has_its_own_dropout() -> None:
    backbone = tiny_backbone("bert")
    sites = {Site(0, "query"): 0.0, Site(0, "key"): 0.5, Site(1, "query"): 0.1, Site(1, "key"): 0.5}
    configuration = Configuration(
        {site: Adapter("lora", 2, {"dropout": dropout}) for site, dropout in sites.items()}
    )
    with attach(backbone, configuration) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.3)
        backbone.model.train()
        hidden = torch.ones(4000, 32)
        for site, dropout in sites.items():
            layer = backbone.model.get_submodule(backbone.shape(site).module)
            down = attachment.parameters[f"{site}.lora.lora_A.weight"]
            up = attachment.parameters[f"{site}.lora.lora_B.weight"]
            # Each input is dropped with probability p and divided by 1 − p: variance p / (1 − p).
            weights = 8 / math.sqrt(2) * up @ down
            expected = math.sqrt(dropout / (1 - dropout)) * weights.norm(dim=1)
            spread = layer(hidden).std(dim=0)
            torch.testing.assert_close(spread, expected, rtol=0.1, atol=1e-4)


def test_starts_with_a_zero_update_and_a_drawn_down_projection() -> None:
    backbone = tiny_backbone("bert")
    with attach(backbone, Configuration({Site(0, "query"): Adapter("lora", 4)})) as attachment:
        assert attachment.parameters["0.query.lora.lora_A.weight"].std() > 0
        assert attachment.parameters["0.query.lora.lora_B.weight"].abs().max() == 0


def test_training_moves_the_output() -> None:
    backbone = tiny_backbone("llama")
    before = logits_of(backbone)
    configuration = Configuration({Site(1, "query"): Adapter("lora", 2)})
    with attach(backbone, configuration) as attachment:
        adapters = [parameter for name, parameter in attachment.parameters.items() if "lora" in name]
        optimizer = torch.optim.SGD(adapters, lr=1.0)
        for _ in range(2):
            loss = nn.functional.cross_entropy(backbone.model(**tiny_batch()).logits, torch.arange(3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert not torch.equal(logits_of(backbone), before)
    assert torch.equal(logits_of(backbone), before)
