"""Sixty-five architectures: whether each has sites for its attention or mixer, and for its ffn or experts.

Models are built on the meta device, without weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from autopeft.core.adapter import Site
from autopeft.models.backbone import Backbone
from tests.tiny_models import OPTIONS

_BERT: dict[str, Any] = {**OPTIONS["bert"]}
_LLAMA: dict[str, Any] = {**OPTIONS["llama"]}
_BART: dict[str, Any] = {**OPTIONS["bart"]}
_VIT: dict[str, Any] = {**OPTIONS["vit"]}
_SPEECH: dict[str, Any] = {**OPTIONS["wav2vec2"]}
_GPT2: dict[str, Any] = {**OPTIONS["gpt2"]}
_STAGES = {"depths": [1, 2], "num_heads": [2, 2]}
_TOWER = {
    key: _BERT[key]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
_IMAGE_TOWER = _TOWER | {"image_size": 16, "patch_size": 8}
_TWO_TOWERS = {"text_config": _BERT, "vision_config": _IMAGE_TOWER}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    # Text encoders.
    "albert": OPTIONS["albert"],
    "bert": _BERT,
    "big_bird": _BERT,
    "camembert": _BERT,
    "convbert": _BERT,
    "deberta": _BERT,
    "deberta-v2": OPTIONS["deberta-v2"],
    "distilbert": OPTIONS["distilbert"],
    "electra": _BERT,
    "ernie": _BERT,
    "esm": _BERT,
    "longformer": _BERT | {"attention_window": 8},
    "megatron-bert": _BERT,
    "modernbert": OPTIONS["modernbert"],
    "mpnet": _BERT,
    "nystromformer": _BERT,
    "rembert": _BERT,
    "roberta": _BERT,
    "roformer": _BERT,
    "xlm-roberta": _BERT,
    "xlnet": OPTIONS["xlnet"],
    # Decoders.
    "biogpt": _BERT,
    "bloom": OPTIONS["bloom"],
    "codegen": _GPT2 | {"rotary_dim": 4},
    "cohere": _LLAMA,
    "falcon": OPTIONS["falcon"],
    "gemma2": OPTIONS["gemma2"],
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "gpt_neox": _BERT,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mpt": OPTIONS["mpt"],
    "olmo2": _LLAMA,
    "opt": OPTIONS["opt"],
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": OPTIONS["qwen3"],
    "stablelm": _LLAMA,
    # Encoder-decoders.
    "bart": _BART,
    "led": _BART | {"attention_window": 8},
    "marian": _BART,
    "pegasus": _BART,
    "t5": OPTIONS["t5"],
    # Vision.
    "beit": _VIT,
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
    "deit": _VIT,
    "dinov2": _VIT,
    "swin": _STAGES | {"image_size": 32, "patch_size": 2, "embed_dim": 8, "window_size": 4},
    "vit": _VIT,
    # Audio.
    "audio-spectrogram-transformer": _TOWER,
    "hubert": _SPEECH,
    "wav2vec2": _SPEECH,
    "whisper": _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    # State spaces and mixtures.
    "mamba": OPTIONS["mamba"],
    "mamba2": OPTIONS["mamba2"],
    "rwkv": OPTIONS["rwkv"],
    "gpt_oss": OPTIONS["gpt_oss"],
    "mixtral": OPTIONS["mixtral"],
    "qwen3_moe": OPTIONS["qwen3_moe"],
    # Composites.
    "clip": _TWO_TOWERS,
    "llava": {"text_config": _LLAMA | {"model_type": "llama"}, "vision_config": _IMAGE_TOWER},
}

WITHOUT_FFN = {"mamba", "mamba2"}
"""Their blocks have a mixer alone."""


@cache
def backbone_of(architecture: str) -> Backbone:
    """Return a backbone without weights; `AutoModel` draws none on the meta device."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(architecture, **ARCHITECTURES[architecture]))
    return Backbone(model, None, name=architecture, head=(), new_head=False)


def _mixes(backbone: Backbone) -> bool:
    """Whether there are sites in attention or mixer; of XLNet, whose attention has no layers, its norm."""
    of_layers = {"query", "qkv", "convolution", "mixer.in_proj", "attention.receptance"} & {*backbone.roles}
    norms = [shape.module for shape in backbone.sites.values() if shape.site.role == "attention_norm"]
    return bool(of_layers) or any("rel_attn" in name for name in norms)


def test_there_are_sixty_five() -> None:
    assert len(ARCHITECTURES) == 65


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_has_sites_for_attention_or_mixer_and_for_ffn_or_experts(architecture: str) -> None:
    backbone = backbone_of(architecture)
    assert _mixes(backbone)
    has_ffn = bool({"ffn_down", "ffn_experts_down"} & {*backbone.roles})
    assert has_ffn == (architecture not in WITHOUT_FFN)
    used = {site.place for site in backbone.sites}
    assert used == {*backbone.places}  # no block is empty
    for site, shape in backbone.sites.items():
        if shape.kind in ("linear", "experts", "convolution"):
            assert shape.parameters >= shape.in_features * shape.out_features or shape.kind == "convolution"
            assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("architecture", "stacks"),
    [
        ("bert", {"": 2}),
        ("t5", {"encoder": 2, "decoder": 2}),
        ("whisper", {"encoder": 2, "decoder": 2}),
        ("clip", {"vision": 2, "text": 2}),
        ("llava", {"vision": 2, "text": 2}),
        ("swin", {"": 3}),
        ("convnext", {"": 3}),
    ],
)
def test_has_its_stacks(architecture: str, stacks: Mapping[str, int]) -> None:
    found = backbone_of(architecture).stacks
    assert {name: len(places) for name, places in found.items()} == stacks


@pytest.mark.parametrize(
    ("architecture", "roles"),
    [
        ("mamba", {"mixer.in_proj", "convolution", "state_space", "attention_norm"}),
        ("mamba2", {"mixer.in_proj", "convolution", "state_space", "attention_norm"}),
        ("convnext", {"convolution", "ffn_up", "ffn_down", "attention_norm", "ffn"}),
        ("xlnet", {"ffn_up", "ffn_down", "attention_norm", "ffn_norm", "ffn"}),
    ],
)
def test_blocks_without_attention_name_their_layers(architecture: str, roles: set[str]) -> None:
    assert {*backbone_of(architecture).roles} - {"block"} == roles


def test_layers_that_kernels_read_past_have_no_sites() -> None:
    text = backbone_of("mamba").summary()
    assert "without a role: mixer.dt_proj, mixer.out_proj, mixer.x_proj" in text
