"""Layers made directly against those that peft's own injection makes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Configuration
from autopeft.methods import attach, peft_methods
from autopeft.methods.base import undrawn_linears
from autopeft.methods.peft_methods import PeftMethod
from autopeft.models.backbone import Backbone
from tests.tiny_models import draw_parameters, everywhere, logits_of, tiny_backbone

ARCHITECTURES = ("bert", "deberta-v2", "gpt2", "llama", "modernbert", "t5")


def described(model: nn.Module) -> dict[str, Any]:
    """Return everything of peft's layers that is neither a tensor nor a module."""
    kept = (bool, int, float, str, dict, list, set, tuple, type(None))
    left_out = ("_parameters", "_modules", "_buffers", "kwargs")  # kwargs is for quantised layers
    return {
        f"{name}.{key}": repr(value)
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        for key, value in vars(layer).items()
        if isinstance(value, kept) and key not in left_out
    }


def attached(backbone: Backbone, configuration: Configuration) -> tuple[dict[str, Any], ...]:
    with attach(backbone, configuration, seed=5) as attachment:
        backbone.model.train()
        states: dict[str, Tensor] = attachment.state_dict()
        trainable = {name: one.requires_grad for name, one in backbone.model.named_parameters()}
        draw_parameters(attachment.parameters.values(), std=0.1)
        backbone.model.eval()
        return states, trainable, described(backbone.model), {"logits": logits_of(backbone)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_is_the_one_peft_injects(
    architecture: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(architecture)
    nn.Module.to(backbone.model, dtype)
    configuration = everywhere(backbone, method, size=3)
    if method == "lora":  # several configs, with their own options
        mixed = {
            site: Adapter("lora", 1 + site.block, {"rslora": site.block % 2 == 0, "alpha": 7 + site.block})
            for site in configuration.adapters
        }
        configuration = Configuration(mixed)
    injected: list[str] = []
    inject = PeftMethod._inject

    def noted(self: PeftMethod, *rest: Any) -> None:
        injected.append(self.name)
        inject(self, *rest)

    monkeypatch.setattr(PeftMethod, "_inject", noted)
    direct = attached(backbone, configuration)
    assert not injected
    monkeypatch.setattr(peft_methods, "_is_plain", lambda module: False)
    expected = attached(backbone, configuration)
    assert set(injected) == {method}
    for ours, theirs in zip(direct, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
            assert same, (name, value, theirs[name])


def test_linear_layers_are_left_undrawn_in_this_thread_alone() -> None:
    def drawn() -> bool:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        nn.Linear(2, 2)
        return not torch.equal(torch.get_rng_state(), state)

    before = nn.Linear.reset_parameters
    with ThreadPoolExecutor(1) as other:
        with undrawn_linears():
            with undrawn_linears():
                assert not drawn()
                assert other.submit(drawn).result()
            assert not drawn()
            waiting = other.submit(_enter_and_leave)  # waits until this thread has left
            assert not waiting.done()
        waiting.result()
        assert other.submit(drawn).result()
    assert drawn()
    assert nn.Linear.reset_parameters is before


def _enter_and_leave() -> None:
    with undrawn_linears():
        pass


@pytest.mark.parametrize("method", ["lora", "series", "parallel"])
def test_every_weight_of_an_adapter_is_drawn_or_0(method: str) -> None:
    """Memory that nobody has written may hold anything; here it holds what no adapter begins with."""
    backbone = tiny_backbone("bert")
    empty = torch.empty
    with (
        patch(
            "torch.nn.modules.linear.torch.empty", lambda *size, **options: empty(*size, **options).fill_(7)
        ),
        attach(backbone, everywhere(backbone, method, size=3)) as attachment,
    ):
        state = attachment.state_dict()
    for name, tensor in state.items():
        if not name.startswith("head."):
            assert tensor.abs().max() < 1, name
