from __future__ import annotations

import copy
import html
import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import KIND_OF_ROLE, METHOD_SPECS
from autopeft.models.backbone import Backbone
from tests.tiny_models import (
    HEADS,
    tiny_backbone,
    tiny_classifier,
    tiny_tokenizer,
)


def _backbone(model: PreTrainedModel, **options: object) -> Backbone:
    arguments = {"name": "tiny", "head": ("classifier",)} | options
    return Backbone(model, tiny_tokenizer(), **arguments)  # type: ignore[arg-type]


class TestSites:
    def test_an_encoder(self) -> None:
        backbone = tiny_backbone("bert")
        assert backbone.roles == (
            "query",
            "key",
            "value",
            "attention_output",
            "ffn_up",
            "ffn_down",
            "attention_norm",
            "ffn_norm",
            "attention",
            "ffn",
            "block",
        )
        assert set(backbone.sites) == {Site(block, role) for block in (0, 1) for role in backbone.roles}
        shape = backbone.shape(Site(1, "ffn_up"))
        assert (shape.kind, shape.in_features, shape.out_features) == ("linear", 32, 64)
        assert (shape.parameters, shape.bias, shape.transposed) == (32 * 64 + 64, 64, False)
        assert shape.module == shape.input_module == "bert.encoder.layer.1.intermediate.dense"

    def test_a_norm(self) -> None:
        shape = tiny_backbone("bert").shape(Site(0, "ffn_norm"))
        assert (shape.kind, shape.parameters, shape.bias) == ("norm", 64, 32)
        assert (shape.in_features, shape.out_features) == (32, 32)
        shape = tiny_backbone("llama").shape(Site(0, "ffn_norm"))
        assert (shape.parameters, shape.bias) == (32, 0)

    def test_a_fused_and_transposed_projection(self) -> None:
        shape = tiny_backbone("gpt2").shape(Site(0, "qkv"))
        assert (shape.in_features, shape.out_features, shape.transposed) == (32, 96, True)
        assert shape.parameters == 32 * 96 + 96

    @pytest.mark.parametrize(
        ("architecture", "key_value_features", "module", "input_module", "attention_module"),
        [
            ("bert", 32, "attention.output.dense", "attention.self.query", "attention.self"),
            ("llama", 16, "self_attn.o_proj", "self_attn.q_proj", "self_attn"),
            ("gpt2", 32, "attn.c_proj", "attn.c_attn", "attn"),
            ("modernbert", 32, "attn.Wo", "attn.Wqkv", "attn"),
        ],
    )
    def test_the_attention_sublayer(
        self,
        architecture: str,
        key_value_features: int,
        module: str,
        input_module: str,
        attention_module: str,
    ) -> None:
        shape = tiny_backbone(architecture).shape(Site(1, "attention"))
        assert (shape.kind, shape.in_features, shape.out_features) == ("attention", 32, 32)
        assert shape.key_value_features == key_value_features
        assert shape.module.endswith(f".1.{module}")
        assert shape.input_module.endswith(f".1.{input_module}")
        assert shape.attention_module.endswith(f".1.{attention_module}")

    def test_fused_keys_of_fewer_heads(self) -> None:
        model = tiny_classifier("phi3")
        shape = _backbone(model, head=("score",)).shape(Site(0, "attention"))
        assert shape.key_value_features == 16

    @pytest.mark.parametrize(
        ("architecture", "module", "input_module"),
        [
            ("bert", "output.dense", "intermediate.dense"),
            ("llama", "mlp.down_proj", "mlp.up_proj"),
            ("modernbert", "mlp.Wo", "mlp.Wi"),
        ],
    )
    def test_the_ffn_sublayer(self, architecture: str, module: str, input_module: str) -> None:
        shape = tiny_backbone(architecture).shape(Site(0, "ffn"))
        assert (shape.kind, shape.in_features, shape.out_features) == ("ffn", 32, 32)
        assert shape.module.endswith(f".0.{module}")
        assert shape.input_module.endswith(f".0.{input_module}")

    @pytest.mark.parametrize("architecture", sorted(HEADS))
    def test_every_site_is_what_it_says(self, architecture: str) -> None:
        backbone = tiny_backbone(architecture)
        for site, shape in backbone.sites.items():
            assert shape.site == site
            assert shape.kind == KIND_OF_ROLE[site.role]
            module = backbone.model.get_submodule(shape.module)
            if shape.kind == "block":  # what sits there changes none of its weights
                continue
            assert sum(parameter.numel() for parameter in module.parameters()) == shape.parameters
            bias = getattr(module, "bias", None)
            assert shape.bias == (0 if bias is None else bias.numel())
            assert shape.module.startswith(
                tuple(
                    name for name, submodule in backbone.model.named_modules() if submodule in backbone.blocks
                )
            )

    def test_a_block_without_experts_roles_has_no_ffn_site(self) -> None:
        backbone = _backbone(tiny_classifier("mixtral"), head=("score",))
        assert "ffn" not in backbone.roles
        assert "attention" in backbone.roles

    def test_blocks_are_the_models_own(self) -> None:
        backbone = tiny_backbone("bert")
        assert backbone.blocks == tuple(backbone.model.bert.encoder.layer)  # type: ignore[union-attr, arg-type]


class TestMissingSites:
    def test_a_block_too_far(self) -> None:
        with pytest.raises(ValueError, match=r"no block 5 \(site 5.query\): its 2 blocks are numbered"):
            tiny_backbone("bert").shape(Site(5, "query"))

    def test_a_role_it_lacks(self) -> None:
        with pytest.raises(ValueError, match="'qkv' in block 1; it has query, key, value,"):
            tiny_backbone("bert").shape(Site(1, "qkv"))

    def test_check_names_the_first_obstacle(self) -> None:
        backbone = tiny_backbone("llama")
        backbone.check(Configuration({Site(0, "query"): Adapter("lora", 4)}))
        backbone.check(Configuration())
        configuration = Configuration({Site(1, "query"): Adapter("bitfit")})
        with pytest.raises(ValueError, match=r"'bitfit' cannot sit on 1.query of tiny-llama: .*no bias"):
            backbone.check(configuration)

    def test_obstacles(self) -> None:
        backbone = tiny_backbone("bert")
        shape = backbone.shape(Site(0, "query"))
        possible = [name for name in METHOD_SPECS if backbone.obstacle(shape, name) is None]
        assert {"lora", "ia3", "bitfit", "vera"} <= set(possible)
        assert not {"layernorm", "series", "parallel", "prefix"} & set(possible)
        assert backbone.obstacle(shape, "series") == "it is a linear site"


class TestAttentionInterface:
    @pytest.mark.parametrize(
        ("architecture", "expected"),
        [("bert", True), ("llama", True), ("gpt2", True), ("deberta-v2", False), ("t5", False)],
    )
    def test_what_models_have(self, architecture: str, expected: bool) -> None:
        assert tiny_backbone(architecture).has_attention_interface is expected

    def test_gemma2_needs_a_soft_cap_that_sdpa_lacks(self) -> None:
        backbone = _backbone(tiny_classifier("gemma2"), head=("score",))
        assert not backbone.has_attention_interface
        shape = backbone.shape(Site(0, "attention"))
        assert "attention interface with SDPA" in (backbone.obstacle(shape, "prefix") or "")
        assert backbone.obstacle(shape, "series") is None


class TestHead:
    def test_counts(self) -> None:
        backbone = tiny_backbone("distilbert")
        assert backbone.head_parameters == 32 * 32 + 32 + 3 * 32 + 3
        assert backbone.parameters == sum(parameter.numel() for parameter in backbone.model.parameters())

    def test_a_parameter_named_by_two_heads_counts_once(self) -> None:
        model = tiny_classifier("deberta-v2")
        twice = _backbone(model, head=("pooler", "pooler.dense", "classifier"))
        assert twice.head_parameters == _backbone(model, head=("pooler", "classifier")).head_parameters

    def test_must_exist(self) -> None:
        with pytest.raises(ValueError, match="no head module clasifier: pass a"):
            _backbone(tiny_classifier("bert"), head=("clasifier",))

    def test_everything_is_frozen(self) -> None:
        backbone = tiny_backbone("bert")
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_model_without_blocks_is_refused() -> None:
    model = tiny_classifier("bert")
    model.bert.encoder.layer = nn.ModuleList()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="No block was found"):
        _backbone(model)


class TestIdentity:
    def test_tells_what_it_is(self) -> None:
        backbone = tiny_backbone("bert")
        identity = backbone.identity()
        assert identity["class"] == "BertForSequenceClassification"
        assert identity["model_type"] == "bert"
        assert (identity["blocks"], identity["head"]) == ("2", "classifier")
        assert identity["parameters"] == str(backbone.parameters)
        assert re.fullmatch("[0-9a-f]{64}", identity["fingerprint"])
        assert all(isinstance(value, str) for value in identity.values())

    def test_the_fingerprint_follows_the_weights(self) -> None:
        backbone, again, other = (tiny_backbone("bert", seed=seed) for seed in (0, 0, 1))
        assert backbone.fingerprint == again.fingerprint != other.fingerprint

    def test_the_fingerprint_sees_every_value(self) -> None:
        model = tiny_classifier("bert")
        edited = copy.deepcopy(model)
        with torch.no_grad():
            edited.get_parameter("bert.embeddings.word_embeddings.weight")[77, 5] += 0.01
        assert _backbone(model).fingerprint != _backbone(edited).fingerprint

    def test_the_fingerprint_tells_architectures_apart(self) -> None:
        found = {tiny_backbone(architecture).fingerprint for architecture in ("bert", "roberta", "llama")}
        assert len(found) == 3

    @pytest.mark.parametrize("new_head", [True, False])
    def test_the_heads_weights_do_not_count(self, new_head: bool) -> None:
        """The head of a loaded model may be fresh from transformers: random, in every process another."""
        model = tiny_classifier("bert")
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.classifier.weight.add_(1)  # type: ignore[operator, union-attr]
        backbone, again = (_backbone(each, new_head=new_head) for each in (model, other))
        assert backbone.fingerprint == again.fingerprint

    def test_the_fingerprint_does_not_depend_on_precision_of_reading(self) -> None:
        single = tiny_backbone("bert")
        half = copy.deepcopy(single.model).bfloat16()
        assert _backbone(half).fingerprint != single.fingerprint


def test_summary_lists_roles_sizes_and_methods() -> None:
    text = tiny_backbone("deberta-v2").summary()
    assert "Backbone('tiny-deberta-v2', DebertaV2ForSequenceClassification, 2 blocks" in text
    row = next(line for line in text.splitlines() if "ffn_up" in line)
    for part in ("linear", "0-1", "intermediate.dense", "32 → 64", "lora, ia3, full"):
        assert part in row
    assert "Linear layers without a role: attention.self.pos_key_proj" in text
    assert "without a role" not in tiny_backbone("bert").summary()


def test_notebooks_get_the_summary() -> None:
    backbone = tiny_backbone("bert")
    assert backbone._repr_html_() == f"<pre>{html.escape(backbone.summary())}</pre>"


def test_summary_names_blocks_as_ranges() -> None:
    backbone = tiny_backbone("modernbert", num_hidden_layers=4)
    row = next(line for line in backbone.summary().splitlines() if "attention_norm" in line)
    assert "1-3" in row
