"""Adapters that are turned off for a reference, and on again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopeft import adapters_off
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import FullFineTuning, attach
from autopeft.models.backbone import Backbone
from tests.every_method import EVERY_METHOD, architecture_for
from tests.tiny_models import draw_parameters, tiny_backbone, tiny_batch


def logits_of(backbone: Backbone) -> Tensor:
    found: Tensor = backbone.model(**tiny_batch()).logits
    return found


def adapted(backbone: Backbone, method: str) -> Configuration:
    size = 2 if METHOD_SPECS[method].size_name else None
    return Configuration(
        {
            site: Adapter(method, size)
            for site, shape in backbone.sites.items()
            if not backbone.obstacle(shape, method)
        }
    )


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_model_with_adapters_off_is_the_backbone(method: str) -> None:
    backbone = tiny_backbone(architecture_for(method), new_head=False)
    plain = logits_of(backbone).detach()
    with attach(backbone, adapted(backbone, method)) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.3)
        trained = logits_of(backbone)
        assert not torch.allclose(trained, plain, atol=1e-3)
        with adapters_off(backbone.model), torch.no_grad():
            reference = logits_of(backbone)
        assert torch.equal(reference, plain)
        assert torch.equal(logits_of(backbone), trained)
        trained.sum().backward()
        assert all(parameter.grad is not None for parameter in attachment.parameters.values())
        assert all(parameter.requires_grad for parameter in attachment.parameters.values())
    assert torch.equal(logits_of(backbone), plain)


def test_the_weights_of_full_fine_tuning_are_turned_off_too() -> None:
    backbone = tiny_backbone("bert", new_head=False)
    plain = logits_of(backbone).detach()
    with FullFineTuning(backbone, Configuration()) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.3)
        with adapters_off(backbone.model), torch.no_grad():
            assert torch.equal(logits_of(backbone), plain)
        assert not torch.allclose(logits_of(backbone), plain, atol=1e-3)


def test_a_failure_turns_adapters_on_again() -> None:
    backbone = tiny_backbone("bert", new_head=False)
    with attach(backbone, Configuration({Site(0, "ffn"): Adapter("series", 2)})):
        with pytest.raises(ZeroDivisionError), adapters_off(backbone.model):
            raise ZeroDivisionError
        assert all(getattr(module, "is_on", True) for module in backbone.model.modules())
