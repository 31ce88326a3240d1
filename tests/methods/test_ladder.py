from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from autopeft.core.configuration import Adapter, AdapterLike, Configuration, Site
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.export import export_adapter, load_adapter
from autopeft.methods import attach, count_parameters
from autopeft.methods.ladder import Rung
from autopeft.models.backbone import Backbone
from autopeft.models.block_discovery import find_blocks
from autopeft.models.site_shapes import whole_blocks
from benchmarks.memory import measure_live_storage
from tests.exports import trained
from tests.loss_task import CROSS_ENTROPY
from tests.tiny_models import (
    LABELS,
    draw_parameters,
    everywhere,
    logits_of,
    tiny_backbone,
    tiny_batch,
    tiny_classifier,
    tiny_language_model,
)


def _widths(*widths: int) -> Configuration:
    return Configuration(
        {Site(block, "block"): Adapter("ladder", width) for block, width in enumerate(widths)}
    )


def test_rungs_of_any_widths_share_one_projection_a_stack() -> None:
    backbone = tiny_backbone("bert")
    configuration = _widths(3, 5)
    expected = 3 * (32 + 3 + 2) + 1 + 5 * (32 + 5 + 2) + 1 + (5 + 1) * 32
    assert count_parameters(backbone, configuration) - backbone.head_parameters == expected
    with attach(backbone, configuration) as attachment:
        assert attachment.parameters["ladder.shared.up.weight"].shape == (32, 5)
    stacks = tiny_backbone("t5")
    with attach(stacks, everywhere(stacks, "ladder")) as attachment:
        shared = {name for name in attachment.parameters if name.startswith("ladder.shared.")}
        assert {name.split(".")[2] for name in shared} == {"encoder", "decoder"}


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_no_gradient_goes_through_the_blocks(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    batch = {**tiny_batch(), "labels": torch.arange(LABELS)}
    counter = MemoryCounter(backbone.model)
    peaks = {}
    for method in ("ladder", "lora"):
        with attach(backbone, everywhere(backbone, method, size=2)):
            output = backbone.model(**tiny_batch(), output_hidden_states=True)
            *states, _ = output.hidden_states[1:]  # the last has what the ladder adds
            assert all(state.requires_grad is (method == "lora") for state in states)
            peaks[method] = counter.count(batch, CROSS_ENTROPY)
            backbone.model.train()
            assert peaks[method] == pytest.approx(
                measure_live_storage(backbone.model, batch, CROSS_ENTROPY), rel=0.005
            )
            backbone.model.eval()
    assert peaks["ladder"] < peaks["lora"]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert", "albert"])
def test_padding_takes_no_part_in_means(architecture: str) -> None:
    backbone = Backbone(tiny_classifier(architecture).eval(), None, name="tiny", head=())
    batch = tiny_batch(padding=4)
    with attach(backbone, everywhere(backbone, "ladder")) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.5)
        padded = logits_of(backbone, batch)[1:]
        alone = logits_of(backbone, {name: tensor[1:, :5] for name, tensor in batch.items()})
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_rung_mixes_by_its_gate_and_adds_the_mean_over_tokens() -> None:
    rung = Rung(6, 2)
    draw_parameters(rung.parameters(), std=1.0)
    hidden, state = torch.randn(1, 3, 6), torch.randn(1, 3, 4)
    share = torch.sigmoid(rung.gate)
    normal = (hidden - hidden.mean(-1, keepdim=True)) / (
        hidden.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    own = share * rung.down(normal) + (1 - share) * state[..., :2]
    found = torch.nn.functional.gelu(rung.mix(own))
    half = torch.tensor([0.5, 0.5, 0.0])[None, :, None]
    cases: list[tuple[Tensor | None, Tensor]] = [(None, torch.zeros(2)), (half, found[:, :2].mean(1))]
    for weights, mean in cases:
        expected = torch.cat([own + found + mean, state[..., 2:]], dim=-1)
        torch.testing.assert_close(rung(hidden, state, weights), expected)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mamba"])
@torch.no_grad()
def test_tokens_do_not_see_later_ones_and_the_cache_serves(architecture: str) -> None:
    model: Any = tiny_language_model(architecture)
    backbone = Backbone(model, None, name="tiny", head=())
    prompt = tiny_batch(rows=2, padding=0)
    plain = model(**prompt).logits
    with attach(backbone, everywhere(backbone, "ladder")) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.5)
        whole = model(**prompt).logits
        assert not torch.allclose(whole, plain, atol=1e-2)
        shorter = model(**{name: tensor[:, :-1] for name, tensor in prompt.items()}).logits
        torch.testing.assert_close(whole[:, :-1], shorter, rtol=1e-4, atol=1e-4)
        told = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
        written = [model.generate(**prompt, **told, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*written)


@torch.no_grad()
def test_attention_that_is_called_causal_has_no_means() -> None:
    """CLIP's attention says that it is not causal, and its text model calls it causal."""
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = AutoConfig.for_model("clip_text_model", vocab_size=120, num_hidden_layers=2, **widths)
    backbone = Backbone(AutoModel.from_config(config).eval(), None, name="tiny", head=())
    prompt = tiny_batch(rows=2, padding=0)
    shorter = {name: tensor[:, :-1] for name, tensor in prompt.items()}
    with attach(backbone, everywhere(backbone, "ladder")) as attachment:
        draw_parameters(attachment.parameters.values(), std=0.5)
        whole, part = (backbone.model(**batch).last_hidden_state for batch in (prompt, shorter))
    torch.testing.assert_close(whole[:, :-1], part, rtol=1e-4, atol=1e-4)


def test_other_adapters_train_beside_it_as_without_checkpointing() -> None:
    """The ladder's own computation stands outside of what is run again in the backward pass."""
    sites: dict[Site, AdapterLike] = {Site(0, "query"): Adapter("lora", 2), **_widths(2, 4).adapters}
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny_backbone("llama")
        if checkpointing:
            backbone.enable_checkpointing()
        with attach(backbone, Configuration(sites)) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.2)
            backbone.model.train()
            losses = [backbone.model(**tiny_batch(seed=seed)).logits.square().sum() for seed in (0, 1)]
            torch.stack(losses).sum().backward()
            gradients.append({name: parameter.grad for name, parameter in attachment.parameters.items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_export_loads(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    configuration = _widths(2, 4)
    state = trained(backbone, configuration)
    report = export_adapter(
        backbone, configuration, state, tmp_path / "out", probe=tiny_batch(), fresh=False, verify=False
    )
    assert "ladder/adapter.safetensors" in report.files
    with attach(backbone, configuration) as attachment:
        attachment.load_state_dict(state)
        expected = logits_of(backbone)
    loaded = load_adapter(tiny_classifier("bert"), tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tiny_batch()).logits, expected)
    with pytest.raises(ValueError, match=r"0\.block \(ladder\)"):
        export_adapter(backbone, configuration, state, tmp_path / "not", probe=tiny_batch(), target="merged")


def test_a_stack_that_returns_something_else_is_said() -> None:
    backbone = Backbone(tiny_classifier("xlnet"), None, name="tiny", head=("logits_proj",))
    with (
        attach(backbone, everywhere(backbone, "ladder")),
        pytest.raises(ValueError, match=r"beside XLNetModel: its blocks return the shape \(9, 3, 32\)"),
    ):
        logits_of(backbone)


def test_stages_of_unlike_widths_have_no_such_site() -> None:
    config = AutoConfig.for_model("convnext", hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)
    assert list(whole_blocks(find_blocks(AutoModel.from_config(config)))) == []
