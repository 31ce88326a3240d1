from __future__ import annotations

import pytest
import torch

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import attach
from tests.tiny_models import draw_parameters, everywhere, tiny_backbone, tiny_batch


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "distilbert"])
def test_only_biases_are_trained(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    configuration = everywhere(backbone, "bitfit")
    biased = {backbone.shape(site).module for site in configuration.adapters}
    with attach(backbone, configuration):
        trained = {
            name
            for name, parameter in backbone.model.named_parameters()
            if parameter.requires_grad and not name.startswith(backbone.head)
        }
    assert trained == {f"{module}.bias" for module in biased}


@pytest.mark.parametrize("role", ["qkv", "ffn_down", "ffn_norm"])
@torch.no_grad()
def test_shifts_the_output(role: str) -> None:
    backbone, site = tiny_backbone("gpt2"), Site(0, role)
    shape = backbone.shape(site)
    module = backbone.model.get_submodule(shape.module)
    hidden = torch.randn(2, 5, shape.in_features)
    before, original = module(hidden), module.bias
    assert isinstance(original, torch.nn.Parameter)
    with attach(backbone, Configuration({site: Adapter("bitfit")})) as attachment:
        bias = attachment.parameters[f"{site}.bitfit.bias"]
        assert bias is not original
        draw_parameters([bias], std=1.0)
        torch.testing.assert_close(module(hidden), before - original + bias)


@pytest.mark.parametrize("companion", [Adapter("lora", 2), Adapter("ia3")])
@torch.no_grad()
def test_shares_a_layer_with_a_wrapping_method(companion: Adapter) -> None:
    backbone, site = tiny_backbone("bert"), Site(0, "query")
    name = backbone.shape(site).module
    layer = backbone.model.get_submodule(name)
    before = layer.bias
    weight = layer.get_parameter("weight")
    hidden = torch.randn(2, 5, 32)
    with attach(backbone, Configuration({site: [Adapter("bitfit"), companion]})) as attachment:
        bias = attachment.parameters[f"{site}.bitfit.bias"]
        draw_parameters([bias], std=1.0)
        found = backbone.model.get_submodule(name)(hidden)
        torch.testing.assert_close(found, hidden @ weight.T + bias)
    assert backbone.model.get_submodule(name) is layer
    assert layer.bias is before


def test_training_leaves_the_backbones_own_bias_alone() -> None:
    backbone, site = tiny_backbone("bert"), Site(1, "ffn_up")
    module = backbone.model.get_submodule(backbone.shape(site).module)
    original = module.bias
    assert isinstance(original, torch.nn.Parameter)
    value = original.detach().clone()
    with attach(backbone, Configuration({site: Adapter("bitfit")})) as attachment:
        backbone.model(**tiny_batch()).logits.sum().backward()
        torch.optim.SGD(attachment.parameters.values(), lr=1.0).step()
        assert not torch.equal(attachment.parameters[f"{site}.bitfit.bias"], value)
    assert module.bias is original
    assert torch.equal(original, value)
