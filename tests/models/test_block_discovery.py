from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from autopeft.models.block_discovery import find_blocks, linear_sizes
from tests.tiny_models import OPTIONS, tiny_model

BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_norm": "output.LayerNorm",
}
LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GPT_NEOX = {
    "qkv": "attention.query_key_value",
    "attention_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
BLOOM = GPT_NEOX | {
    "qkv": "self_attention.query_key_value",
    "attention_output": "self_attention.dense",
}
VIT = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "attention_output": "attention.o_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "attention_norm": "layernorm_before",
    "ffn_norm": "layernorm_after",
}


def _without(roles: Mapping[str, str], *left_out: str) -> dict[str, str]:
    return {role: path for role, path in roles.items() if role not in left_out}


EXPECTED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "albert": (
        "encoder.albert_layer_groups.0",
        {
            "query": "albert_layers.0.attention.query",
            "key": "albert_layers.0.attention.key",
            "value": "albert_layers.0.attention.value",
            "attention_output": "albert_layers.0.attention.dense",
            "ffn_up": "albert_layers.0.ffn",
            "ffn_down": "albert_layers.0.ffn_output",
            "attention_norm": "albert_layers.0.attention.LayerNorm",
            "ffn_norm": "albert_layers.0.full_layer_layer_norm",
        },
    ),
    "bert": ("encoder.layer.1", BERT),
    "bloom": ("h.1", BLOOM),
    # Attention and ffn run side by side behind one norm.
    "cohere": ("layers.1", _without(LLAMA, "ffn_norm")),
    "deberta-v2": (
        "encoder.layer.1",
        BERT
        | {
            "query": "attention.self.query_proj",
            "key": "attention.self.key_proj",
            "value": "attention.self.value_proj",
        },
    ),
    "dinov2": ("encoder.layer.1", VIT | {"attention_norm": "norm1", "ffn_norm": "norm2"}),
    "distilbert": (
        "transformer.layer.1",
        {
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "attention_output": "attention.out_lin",
            "ffn_up": "ffn.lin1",
            "ffn_down": "ffn.lin2",
            "attention_norm": "sa_layer_norm",
            "ffn_norm": "output_layer_norm",
        },
    ),
    "electra": ("encoder.layer.1", BERT),
    "falcon": ("h.1", _without(BLOOM, "ffn_norm")),
    "gemma2": (
        "layers.1",
        LLAMA
        | {
            "attention_post_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "ffn_post_norm": "post_feedforward_layernorm",
        },
    ),
    "gpt2": (
        "h.1",
        {
            "qkv": "attn.c_attn",
            "attention_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
            "attention_norm": "ln_1",
            "ffn_norm": "ln_2",
        },
    ),
    "gpt_neox": ("layers.1", GPT_NEOX),
    "llama": ("layers.1", LLAMA),
    # The experts are parameters.
    "mixtral": (
        "layers.1",
        _without(LLAMA, "ffn_up", "ffn_gate", "ffn_down")
        | {"ffn_experts_gate_up": "mlp.experts.gate_up_proj", "ffn_experts_down": "mlp.experts.down_proj"},
    ),
    "modernbert": (
        "layers.1",
        {
            "qkv": "attn.Wqkv",
            "attention_output": "attn.Wo",
            "ffn_gate_up": "mlp.Wi",
            "ffn_down": "mlp.Wo",
            "attention_norm": "attn_norm",
            "ffn_norm": "mlp_norm",
        },
    ),
    "mpnet": (
        "encoder.layer.1",
        BERT
        | {
            "query": "attention.attn.q",
            "key": "attention.attn.k",
            "value": "attention.attn.v",
            "attention_output": "attention.attn.o",
            "attention_norm": "attention.LayerNorm",
        },
    ),
    "mpt": (
        "blocks.1",
        {
            "qkv": "attn.Wqkv",
            "attention_output": "attn.out_proj",
            "ffn_up": "ffn.up_proj",
            "ffn_down": "ffn.down_proj",
            "attention_norm": "norm_1",
            "ffn_norm": "norm_2",
        },
    ),
    "opt": (
        "decoder.layers.1",
        {
            "query": "self_attn.q_proj",
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "attention_output": "self_attn.out_proj",
            "ffn_up": "fc1",
            "ffn_down": "fc2",
            "attention_norm": "self_attn_layer_norm",
            "ffn_norm": "final_layer_norm",
        },
    ),
    "phi3": (
        "layers.1",
        _without(LLAMA, "query", "key", "value", "ffn_up", "ffn_gate")
        | {"qkv": "self_attn.qkv_proj", "ffn_gate_up": "mlp.gate_up_proj"},
    ),
    "qwen3": ("layers.1", LLAMA | {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}),
    "roberta": ("encoder.layer.1", BERT),
    "t5": (
        "decoder.block.1",
        {
            "query": "layer.0.SelfAttention.q",
            "key": "layer.0.SelfAttention.k",
            "value": "layer.0.SelfAttention.v",
            "attention_output": "layer.0.SelfAttention.o",
            "cross_query": "layer.1.EncDecAttention.q",
            "cross_key": "layer.1.EncDecAttention.k",
            "cross_value": "layer.1.EncDecAttention.v",
            "cross_attention_output": "layer.1.EncDecAttention.o",
            "ffn_up": "layer.2.DenseReluDense.wi",
            "ffn_down": "layer.2.DenseReluDense.wo",
            "attention_norm": "layer.0.layer_norm",
            "cross_attention_norm": "layer.1.layer_norm",
            "ffn_norm": "layer.2.layer_norm",
        },
    ),
    "vit": ("layers.1", VIT),
    "wav2vec2": (
        "encoder.layers.1",
        {
            "query": "attention.q_proj",
            "key": "attention.k_proj",
            "value": "attention.v_proj",
            "attention_output": "attention.out_proj",
            "ffn_up": "feed_forward.intermediate_dense",
            "ffn_down": "feed_forward.output_dense",
            "attention_norm": "layer_norm",
            "ffn_norm": "final_layer_norm",
        },
    ),
}
"""The last block of each tiny model, and the roles in it."""

BLOCKS = {"albert": 1, "t5": 4}
"""ALBERT's layers share their weights; T5's tiny encoder and decoder have two blocks each."""


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_finds_every_block_and_role(architecture: str) -> None:
    name, roles = EXPECTED[architecture]
    blocks = find_blocks(tiny_model(architecture))
    assert len(blocks) == BLOCKS.get(architecture, 2)
    assert blocks[-1].name == name
    assert dict(blocks[-1].roles) == dict(roles)


@pytest.mark.parametrize("architecture", sorted(EXPECTED))
def test_leaves_no_linear_layer_out(architecture: str) -> None:
    positions = ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
    expected = positions if architecture == "deberta-v2" else ()
    assert find_blocks(tiny_model(architecture))[-1].unrecognised == expected


def test_the_roles_are_the_same_in_every_block() -> None:
    for architecture in ("bert", "gpt2", "llama"):
        first, last = find_blocks(tiny_model(architecture))
        assert first.roles == last.roles


def test_a_norm_that_is_left_out_has_no_site() -> None:
    """ModernBERT's first block has none before its attention: the embeddings are normalised already."""
    first, _ = find_blocks(tiny_model("modernbert"))
    assert dict(first.roles) == _without(EXPECTED["modernbert"][1], "attention_norm")


def test_blocks_of_encoder_and_decoder_come_in_order() -> None:
    names = [block.name for block in find_blocks(tiny_model("t5"))]
    assert names == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_falcons_new_decoder_has_two_norms_side_by_side() -> None:
    model = tiny_model("falcon", new_decoder_architecture=True, num_kv_heads=2)
    roles = find_blocks(model)[0].roles
    assert roles["attention_norm"] == "ln_attn"
    assert roles["ffn_norm"] == "ln_mlp"


def test_a_gated_ffn_whose_layers_are_numbered() -> None:
    roles = find_blocks(tiny_model("t5", feed_forward_proj="gated-gelu"))[0].roles
    assert roles["ffn_gate"] == "layer.1.DenseReluDense.wi_0"
    assert roles["ffn_up"] == "layer.1.DenseReluDense.wi_1"


def test_an_ffn_as_narrow_as_the_model() -> None:
    roles = find_blocks(tiny_model("bert", intermediate_size=32))[0].roles
    assert (roles["ffn_up"], roles["ffn_down"]) == ("intermediate.dense", "output.dense")


def test_what_cannot_be_told_apart_has_no_role() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("query", "key", "value", "mix", "project")
            self.attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    (block,) = find_blocks(nn.ModuleList([Block()]))
    assert set(block.roles) == {"query", "key", "value"}
    assert block.unrecognised == ("attention.mix", "attention.project")


def test_stages_are_no_blocks() -> None:
    """Swin nests its blocks: a stage holds several self-attentions."""
    config = AutoConfig.for_model(
        "swin", image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    blocks = find_blocks(AutoModel.from_config(config))
    assert len(blocks) == 4
    assert {"query", "key", "value", "attention_output", "ffn_up", "ffn_down"} <= blocks[0].roles.keys()


def test_blocks_with_attention_and_with_mixers_stand_in_one_list() -> None:
    config = AutoConfig.for_model("jamba", **OPTIONS["jamba"])
    with torch.device("meta"):
        mamba, attention = find_blocks(AutoModel.from_config(config))
    assert (mamba.has_attention, attention.has_attention) == (False, True)
    assert (mamba.roles["mamba.in_proj"], mamba.roles["ffn_up"]) == ("mamba.in_proj", "feed_forward.up_proj")
    assert attention.roles["query"] == "self_attn.q_proj"


def test_a_state_space_beside_attention_is_no_ffn() -> None:
    options = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4}
    config = AutoConfig.for_model("falcon_h1", **OPTIONS["llama"], **options)
    with torch.device("meta"):
        block = find_blocks(AutoModel.from_config(config))[-1]
    assert block.roles["ffn_down"] == "feed_forward.down_proj"
    assert block.roles["mamba.in_proj"] == "mamba.in_proj"
    assert block.unrecognised == ("mamba.out_proj",)


def test_norms_of_sublayers_are_norms_of_a_block_without_attention() -> None:
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.device("meta"):
        block = find_blocks(AutoModel.from_config(AutoConfig.for_model("fnet", **options)))[-1]
    assert dict(block.roles) == {
        "attention_norm": "fourier.output.LayerNorm",
        "ffn_norm": "output.LayerNorm",
        "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense",
    }


def test_a_list_of_stages_is_no_list_of_blocks() -> None:
    config = AutoConfig.for_model("convnext", hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)
    with torch.device("meta"):
        blocks = find_blocks(AutoModel.from_config(config))
    assert [block.name for block in blocks] == [
        "encoder.stages.0.layers.0",
        "encoder.stages.1.layers.0",
        "encoder.stages.1.layers.1",
    ]


def test_names_count_from_the_model_that_is_asked() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("bert")

    assert find_blocks(Wrapped())[0].name == "inner.encoder.layer.0"


class TestNothingFound:
    def test_a_plain_network(self) -> None:
        with pytest.raises(ValueError, match="No block was found in Sequential") as error:
            find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
        assert "Module lists: none. Linear layers are named: 0, 2." in str(error.value)

    def test_a_network_without_linear_layers(self) -> None:
        with pytest.raises(ValueError, match="Linear layers are named: none"):
            find_blocks(nn.Sequential(nn.Conv1d(4, 4, 1)))

    def test_a_list_of_other_modules(self) -> None:
        class Layered(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        with pytest.raises(ValueError, match=r"Module lists: layers \(2 × Linear\)"):
            find_blocks(Layered())


def test_sizes_of_linear_layers() -> None:
    assert linear_sizes(nn.Linear(3, 5)) == (3, 5)
    conv = Conv1D(5, 3)
    assert linear_sizes(conv) == (3, 5)
    assert conv(torch.zeros(2, 3)).shape == (2, 5)
