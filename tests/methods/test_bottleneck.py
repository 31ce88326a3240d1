"""Series and parallel adapters against their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import Attachment, attach, count_site
from autopeft.models.backbone import Backbone
from tests.tiny_models import draw_parameters, logits_of, tiny_backbone, tiny_batch

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
SITES = [
    pytest.param(architecture, role, id=f"{architecture}-{role}")
    for architecture in ("bert", "llama", "gpt2", "modernbert", "distilbert")
    for role in ("attention", "ffn")
]


class Watch:
    """Keeps what a forward pass gives the sublayer's first layer, and its output projection."""

    def __init__(self, backbone: Backbone, site: Site) -> None:
        shape = backbone.shape(site)
        model = backbone.model
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.handles = [
            model.get_submodule(shape.input_module).register_forward_pre_hook(self._keep_input),
            model.get_submodule(shape.module).register_forward_hook(self._keep_output),
        ]

    def _keep_input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs.append(inputs[0])

    def _keep_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.outputs.append(output)

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def _bottleneck(attachment: Attachment, site: Site, method: str, hidden: Tensor, name: str) -> Tensor:
    """f(x) = W_up σ(W_down x + b_down) + b_up"""
    weights = [
        attachment.parameters[f"{site}.{method}.{part}"]
        for part in ("down.weight", "down.bias", "up.weight", "up.bias")
    ]
    draw_parameters(weights, std=0.3)
    down, down_bias, up, up_bias = weights
    return ACTIVATIONS[name](hidden @ down.T + down_bias) @ up.T + up_bias


def _watched_pass(backbone: Backbone, site: Site) -> tuple[Tensor, Tensor]:
    watch = Watch(backbone, site)
    try:
        logits_of(backbone)
    finally:
        watch.stop()
    (output,) = watch.outputs
    return watch.inputs[0], output


@pytest.mark.parametrize(("architecture", "role"), SITES)
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@torch.no_grad()
def test_series_adds_its_output_to_the_projection_it_follows(
    architecture: str, role: str, activation: str
) -> None:
    backbone, site = tiny_backbone(architecture), Site(0, role)
    _, before = _watched_pass(backbone, site)
    adapter = Adapter("series", 3, {"activation": activation})
    with attach(backbone, Configuration({site: adapter})) as attachment:
        expected = before + _bottleneck(attachment, site, "series", before, activation)
        _, after = _watched_pass(backbone, site)
        torch.testing.assert_close(after, expected)


@pytest.mark.parametrize(("architecture", "role"), SITES)
@pytest.mark.parametrize(("activation", "scaling"), [("relu", 4.0), ("silu", 1.0), ("gelu", 0.5)])
@torch.no_grad()
def test_parallel_adds_its_scaled_output_beside_the_sublayer(
    architecture: str, role: str, activation: str, scaling: float
) -> None:
    backbone, site = tiny_backbone(architecture), Site(0, role)
    hidden, before = _watched_pass(backbone, site)
    adapter = Adapter("parallel", 3, {"activation": activation, "scaling": scaling})
    with attach(backbone, Configuration({site: adapter})) as attachment:
        update = _bottleneck(attachment, site, "parallel", hidden, activation)
        _, after = _watched_pass(backbone, site)
        torch.testing.assert_close(after, before + scaling * update)


@torch.no_grad()
def test_parallel_reads_the_hidden_state_where_the_query_layer_runs_twice() -> None:
    """DeBERTa with shared keys sends its relative positions through the query layer as well."""
    backbone = tiny_backbone("deberta-v2", share_att_key=True, num_hidden_layers=1)
    site = Site(0, "attention")
    hidden, before = _watched_pass(backbone, site)
    with attach(backbone, Configuration({site: Adapter("parallel", 3)})) as attachment:
        update = _bottleneck(attachment, site, "parallel", hidden, "gelu")
        _, after = _watched_pass(backbone, site)
        torch.testing.assert_close(after, before + 4.0 * update)


@torch.no_grad()
def test_parallel_forgets_a_pass_that_was_broken_off() -> None:
    backbone, site = tiny_backbone("bert"), Site(0, "attention")
    with attach(backbone, Configuration({site: Adapter("parallel", 3)})) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.3)
        expected = logits_of(backbone)

        def break_off(_module: nn.Module, _inputs: Any) -> None:
            raise RuntimeError("broken off")

        output = backbone.model.get_submodule(backbone.shape(site).module)
        handle = output.register_forward_pre_hook(break_off)
        with pytest.raises(RuntimeError, match="broken off"):
            logits_of(backbone, tiny_batch(rows=2, tokens=12))
        handle.remove()
        torch.testing.assert_close(logits_of(backbone), expected)


@torch.no_grad()
def test_both_on_one_sublayer() -> None:
    """Parallel adds to what series has already added to: hooks run in the order of attaching."""
    backbone, site = tiny_backbone("bert"), Site(1, "ffn")
    hidden, before = _watched_pass(backbone, site)
    configuration = Configuration({site: [Adapter("parallel", 2), Adapter("series", 3)]})
    with attach(backbone, configuration) as attachment:
        series = _bottleneck(attachment, site, "series", before, "gelu")
        parallel = _bottleneck(attachment, site, "parallel", hidden, "gelu")
        _, after = _watched_pass(backbone, site)
        torch.testing.assert_close(after, before + series + 4.0 * parallel)


@torch.no_grad()
def test_series_follows_the_adapted_projection() -> None:
    backbone = tiny_backbone("bert")
    site, projection = Site(0, "ffn"), Site(0, "ffn_down")
    shape = backbone.shape(projection)
    hidden = torch.randn(2, 5, shape.in_features)
    before = backbone.model.get_submodule(shape.module)(hidden)
    configuration = Configuration({site: Adapter("series", 3), projection: Adapter("lora", 2)})
    with attach(backbone, configuration) as attachment:
        down = attachment.parameters["0.ffn_down.lora.lora_A.weight"]
        up = attachment.parameters["0.ffn_down.lora.lora_B.weight"]
        draw_parameters([down, up], std=0.3)
        adapted = before + 8 / 2**0.5 * hidden @ down.T @ up.T
        expected = adapted + _bottleneck(attachment, site, "series", adapted, "gelu")
        torch.testing.assert_close(backbone.model.get_submodule(shape.module)(hidden), expected)


@pytest.mark.parametrize("method", ["series", "parallel"])
def test_count(method: str) -> None:
    backbone = tiny_backbone("bert")
    # b·(d_in + d_out) + b + d_out
    assert count_site(backbone, Site(0, "ffn"), Adapter(method, 5)) == 5 * 64 + 5 + 32


@pytest.mark.parametrize("method", ["series", "parallel"])
@torch.no_grad()
def test_follows_the_models_precision(method: str) -> None:
    backbone = tiny_backbone("bert")
    backbone.model.bfloat16()
    with attach(backbone, Configuration({Site(0, "ffn"): Adapter(method, 3)})) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.3)
        with torch.autocast("cpu", torch.bfloat16):  # adapters are float32 on any base
            assert logits_of(backbone).dtype == torch.bfloat16
