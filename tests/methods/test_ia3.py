from __future__ import annotations

import pytest
import torch

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import attach, count_site
from tests.tiny_models import draw_parameters, tiny_backbone

IA3 = Adapter("ia3")


@pytest.mark.parametrize(
    ("architecture", "role"),
    [("bert", "key"), ("bert", "ffn_up"), ("llama", "value"), ("gpt2", "qkv"), ("gpt2", "ffn_up")],
)
@torch.no_grad()
def test_scales_the_output(architecture: str, role: str) -> None:
    backbone, site = tiny_backbone(architecture), Site(1, role)
    shape = backbone.shape(site)
    hidden = torch.randn(2, 5, shape.in_features)
    before = backbone.model.get_submodule(shape.module)(hidden)
    with attach(backbone, Configuration({site: IA3})) as attachment:
        vector = attachment.parameters[f"{site}.ia3.ia3_l"]
        assert vector.numel() == shape.out_features == count_site(backbone, site, IA3)
        draw_parameters([vector], std=1.0)
        after = backbone.model.get_submodule(shape.module)(hidden)
        torch.testing.assert_close(after, before * vector.flatten())


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "modernbert"])
@torch.no_grad()
def test_scales_the_input_of_the_ffns_last_layer(architecture: str) -> None:
    backbone, site = tiny_backbone(architecture), Site(0, "ffn_down")
    shape = backbone.shape(site)
    original = backbone.model.get_submodule(shape.module)
    hidden = torch.randn(2, 5, shape.in_features)
    with attach(
        backbone, Configuration({site: IA3, Site(0, "ffn_norm"): Adapter("layernorm")})
    ) as attachment:
        vector = attachment.parameters[f"{site}.ia3.ia3_l"]
        assert vector.numel() == shape.in_features == count_site(backbone, site, IA3)
        draw_parameters([vector], std=1.0)
        after = backbone.model.get_submodule(shape.module)(hidden)
        torch.testing.assert_close(after, original(hidden * vector.flatten()))


def test_starts_at_one() -> None:
    backbone = tiny_backbone("bert")
    with attach(backbone, Configuration({Site(0, "value"): IA3})) as attachment:
        assert torch.equal(attachment.parameters["0.value.ia3.ia3_l"], torch.ones(32, 1))
