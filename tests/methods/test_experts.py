"""LoRA of experts whose matrices lie in one parameter of shape (experts, rows, columns)."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.merging import merged_model
from autopeft.export.verification import trained_logits
from autopeft.methods import attach, count_site, obstacle
from autopeft.methods.peft_base import stored_names
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer
from autopeft.search_spaces.score_allocation import Allocation
from autopeft.sensitivity import compute_scores
from autopeft.sensitivity.registry import SCORES
from benchmarks.memory import measure_live_storage
from tests.exports import export, trained
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import OPTIONS, everywhere, fingerprint, places, tiny_batch, tiny_language_model

ARCHITECTURES = ("mixtral", "gpt_oss", "qwen3_moe")
ROLES = ("ffn_experts_gate_up", "ffn_experts_down")


@cache
def backbone_of(architecture: str) -> Backbone:
    return Backbone(
        tiny_language_model(architecture), None, name=f"tiny-{architecture}", head=(), new_head=False
    )


def lora_of(backbone: Backbone) -> Configuration:
    """Return LoRA of many ranks at experts and layers."""
    sites = [site for site in places(backbone, "lora") if site.role in (*ROLES, "query")]
    return Configuration({site: Adapter("lora", 1 + index % 3) for index, site in enumerate(sites)})


def batch_of() -> dict[str, Tensor]:
    batch = tiny_batch(padding=0)
    return batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestAttached:
    def test_counts_every_expert(self, architecture: str) -> None:
        backbone = backbone_of(architecture)
        for role in ROLES:
            shape = backbone.shape(Site(1, role))
            experts, *sizes = backbone.model.get_parameter(shape.target).shape
            assert count_site(backbone, Site(1, role), Adapter("lora", 3)) == 3 * experts * sum(sizes)
            assert {shape.in_features, shape.out_features} == {*sizes}
        assert backbone.shape(Site(0, ROLES[0])).in_features == 32

    def test_starts_where_the_backbone_is_and_goes_without_a_trace(self, architecture: str) -> None:
        backbone, batch = backbone_of(architecture), tiny_batch()
        before = fingerprint(backbone.model)
        with torch.no_grad():
            plain = backbone.model(**batch).logits
            with attach(backbone, lora_of(backbone)):
                assert torch.equal(backbone.model(**batch).logits, plain)
        assert fingerprint(backbone.model) == before

    def test_every_tensor_is_trained(self, architecture: str) -> None:
        backbone, batch = backbone_of(architecture), batch_of()
        configuration = lora_of(backbone)
        state = trained(backbone, configuration)
        with attach(backbone, configuration) as attachment:
            attachment.load_state_dict(state)
            backbone.model(**batch).loss.backward()
            assert all(parameter.grad.any() for parameter in attachment.parameters.values())  # type: ignore[union-attr]

    def test_memory_is_counted(self, architecture: str) -> None:
        backbone, task, batch = backbone_of(architecture), task_of(), batch_of()
        with attach(backbone, lora_of(backbone)):
            counted = MemoryCounter(backbone.model).count(batch, task)
            backbone.model.train()
            assert counted == pytest.approx(measure_live_storage(backbone.model, batch, task), rel=0.02)
            backbone.model.eval()

    def test_export_loads_in_plain_peft(self, architecture: str, tmp_path: Path) -> None:
        backbone, batch = backbone_of(architecture), tiny_batch()
        configuration = lora_of(backbone)
        export(backbone, configuration, tmp_path / "adapter")
        expected = trained_logits(backbone, configuration, trained(backbone, configuration), batch)
        backbone.model.save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with pytest.warns(RuntimeWarning, match="_pattern keys did not match"):  # they do; see peft_base
            loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)

    def test_is_merged(self, architecture: str) -> None:
        backbone, batch = backbone_of(architecture), tiny_batch()
        configuration = lora_of(backbone)
        state, before = trained(backbone, configuration), fingerprint(backbone.model)
        expected = trained_logits(backbone, configuration, state, batch)
        merged = merged_model(backbone, configuration, state).eval()
        assert fingerprint(backbone.model) == before
        assert {*dict(merged.named_modules())} == {*dict(backbone.model.named_modules())}
        with torch.no_grad():
            torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)

    def test_is_trained_in_full(self, architecture: str) -> None:
        backbone, batch = backbone_of(architecture), tiny_batch()
        site, before = Site(1, ROLES[0]), fingerprint(backbone.model)
        configuration = Configuration({site: Adapter("full")})
        state = trained(backbone, configuration)
        numbers = backbone.model.get_parameter(backbone.shape(site).target).numel()
        assert [tensor.numel() for tensor in state.values()] == [numbers]
        expected = trained_logits(backbone, configuration, state, batch)
        merged = merged_model(backbone, configuration, state).eval()
        with torch.no_grad():
            torch.testing.assert_close(merged(**batch).logits, expected)
        assert fingerprint(backbone.model) == before

    def test_gradient_scores_are_those_of_the_flattened_parameter(self, architecture: str) -> None:
        backbone, batch = backbone_of(architecture), batch_of()
        reference = copy.deepcopy(backbone.model).requires_grad_(True)
        names = ("gradient_norm", "fisher", "snip", "gora", "gradient_spectrum", "condition_number")
        before = fingerprint(backbone.model)
        scores = compute_scores(backbone, [batch], task_of(), names, rank=4)
        assert fingerprint(backbone.model) == before
        task_of().loss(reference(**tiny_batch(padding=0)), batch).backward()
        for site in (Site(0, ROLES[0]), Site(1, ROLES[1])):
            weight = reference.get_parameter(backbone.shape(site).target)
            assert weight.grad is not None
            gradient, flat = weight.grad.flatten(0, 1), weight.detach().flatten(0, 1)
            spectrum = torch.linalg.svdvals(flat)
            expected = {
                "gradient_norm": gradient.norm(),
                "fisher": gradient.square().mean(),
                "snip": (flat * gradient).abs().sum(),
                "gora": (flat * gradient).abs().mean(),
                "gradient_spectrum": torch.linalg.svdvals(gradient)[:4].norm(),
                "condition_number": spectrum[-1] / spectrum[0],
            }
            for name, value in expected.items():
                assert scores[name].values[site] == pytest.approx(float(value), rel=1e-3), name


def test_every_score_goes_without_experts_or_has_them() -> None:
    """Scores that need each expert's inputs leave them out; spaces take the mean of their block there."""
    names = [name for name in SCORES if name != "leave_one_out"]
    scores = compute_scores(backbone_of("mixtral"), [batch_of()], task_of(), names)
    without = {name for name, found in scores.items() if Site(0, ROLES[0]) not in found.values}
    assert without == {"explained_variance", "grasp", "hessian"}


def test_dropout_is_refused_and_spaces_offer_none() -> None:
    backbone, options = backbone_of("mixtral"), {"dropout": 0.1}
    why = obstacle(backbone, Site(0, ROLES[1]), Adapter("lora", 2, options))
    assert why == "peft has no dropout in front of experts (set dropout to 0)"
    space = PerLayer(methods=("lora",), options={"lora": options}, learning_rate=1e-3)
    offered = {site.role for site in space.choices(backbone)}
    assert offered
    assert not offered & {*ROLES}
    choice = space.choice_of("lora")
    assert {site.role for site in Allocation(budget=1, choice=choice).candidates(backbone)} == offered


def test_layers_that_peft_takes_for_experts_have_no_lora() -> None:
    """DeepSeek's first block has a dense ffn, whose layers are called as experts were in transformers 4."""
    backbone = backbone_of("deepseek_v3")
    found = {site.role for site in places(backbone, "lora") if site.block == 0}
    assert found == {
        f"self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj")
    }
    for method in ("lora", "dora", "lora_fa", "eva", "lora_ga", "corda"):  # LoRA to peft, once exported
        why = backbone.obstacle(backbone.shape(Site(0, "ffn_up")), method)
        assert why == "peft takes model.layers.0.mlp.up_proj for an expert"
    with attach(backbone, everywhere(backbone, "lora")) as attachment:
        assert any(name.startswith("1.ffn_experts_down") for name in attachment.parameters)


def test_an_expert_is_no_layer_and_a_router_no_site() -> None:
    backbone = backbone_of("mixtral")
    assert len(backbone.blocks) == OPTIONS["mixtral"]["num_hidden_layers"]
    assert not any("gate." in shape.module or "router" in shape.module for shape in backbone.sites.values())


def test_names_of_tensors_in_peft() -> None:
    backbone = backbone_of("mixtral")
    configuration = Configuration({Site(0, role): Adapter("lora", 2) for role in ROLES})
    placement = {site: (backbone.shape(site), adapter) for site, adapter in configuration}
    assert {site.role: name for site, name in stored_names(placement).items()} == {
        "ffn_experts_down": "model.layers.0.mlp.experts.",
        "ffn_experts_gate_up": "model.layers.0.mlp.experts.base_layer.",
    }
