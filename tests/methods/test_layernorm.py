from __future__ import annotations

import pytest
import torch
from torch import nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import attach
from tests.tiny_models import draw_parameters, tiny_backbone

LAYERNORM = Adapter("layernorm")


@pytest.mark.parametrize("role", ["attention_norm", "ffn_norm"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@torch.no_grad()
def test_trains_scale_and_shift_of_a_layer_norm(architecture: str, role: str) -> None:
    backbone, site = tiny_backbone(architecture), Site(1, role)
    original = backbone.model.get_submodule(backbone.shape(site).module)
    assert isinstance(original, nn.LayerNorm)
    hidden = torch.randn(2, 5, 32)
    with attach(backbone, Configuration({site: LAYERNORM})) as attachment:
        trained = {
            name.rpartition(".")[2]: parameter
            for name, parameter in attachment.parameters.items()
            if name.startswith(f"{site}.layernorm.")
        }
        assert trained.keys() == {"weight", "bias"}
        assert torch.equal(trained["weight"], original.weight)
        assert torch.equal(trained["bias"], original.bias)
        draw_parameters(trained.values(), std=1.0)
        expected = nn.functional.layer_norm(hidden, (32,), trained["weight"], trained["bias"], original.eps)
        found = backbone.model.get_submodule(backbone.shape(site).module)(hidden)
        torch.testing.assert_close(found, expected)
        assert trained["weight"] is not original.weight


@torch.no_grad()
def test_trains_the_scale_of_an_rms_norm() -> None:
    backbone, site = tiny_backbone("llama"), Site(0, "attention_norm")
    name = backbone.shape(site).module
    epsilon = backbone.model.config.rms_norm_eps
    hidden = torch.randn(2, 5, 32)
    with attach(backbone, Configuration({site: LAYERNORM})) as attachment:
        (scale,) = (parameter for key, parameter in attachment.parameters.items() if "layernorm" in key)
        draw_parameters([scale], std=1.0)
        unscaled = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + epsilon)
        torch.testing.assert_close(backbone.model.get_submodule(name)(hidden), scale * unscaled)
