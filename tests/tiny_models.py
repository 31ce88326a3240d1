"""Tiny random models of many architectures, and what tests ask of a backbone.

Every parameter is drawn, biases and norms included: a fresh model's zeros and ones would hide what an
adapter does to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_spec import PeftSpec
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import METHODS
from autopeft.models.backbone import Backbone
from autopeft.models.head_spec import HeadSpec

VOCABULARY = 128
LABELS = 3

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}

OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "audio-spectrogram-transformer": {
            **{name: value for name, value in _IMAGE.items() if "image" not in name},
            "num_mel_bins": 16,
            "max_length": 64,
            "time_stride": 8,
            "frequency_stride": 8,
        },
        "albert": _TEXT | {"embedding_size": 16},
        "bart": {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
        },
        "bert": _TEXT,
        "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        "cohere": _GROUPED,
        "deberta-v2": _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "deepseek_v3": _TEXT
        | {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "qk_head_dim": 12,
        },
        "dinov2": _IMAGE,
        "distilbert": {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
        "electra": _TEXT | {"embedding_size": 16},
        "falcon": _TEXT | {"ffn_hidden_size": 64},
        "gemma2": _GROUPED | {"head_dim": 8},
        "gpt2": {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "gpt_neox": _TEXT,
        "gpt_oss": _GROUPED
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None},
        "jamba": _GROUPED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "mamba_d_state": 4,
            "mamba_expand": 2,
        },
        "llama": _GROUPED,
        "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "mamba2": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 4,
            "n_groups": 1,
        },
        "mixtral": _GROUPED | {"num_local_experts": 4},
        "modernbert": _TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 6},
        "mpnet": _TEXT,
        "mpt": {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 64,
        },
        "opt": _TEXT | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "phi3": _GROUPED,
        "qwen3": _GROUPED | {"head_dim": 8},
        "qwen3_moe": _GROUPED
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "roberta": _TEXT,
        "rwkv": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "context_length": 64,
        },
        "t5": {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
        },
        "vit": _IMAGE,
        "wav2vec2": {
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "conv_dim": (16, 16),
            "conv_stride": (16, 10),
            "conv_kernel": (16, 10),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
        "whisper": {
            "vocab_size": VOCABULARY,
            "pad_token_id": 12,
            "bos_token_id": 12,
            "eos_token_id": 12,
            "decoder_start_token_id": 13,
            "begin_suppress_tokens": None,
            "num_mel_bins": 16,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 25,
            "max_target_positions": 64,
            "classifier_proj_size": 32,
        },
        "xlnet": {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    }
)
"""What makes each architecture tiny: two blocks of width 32, an ffn of width 64, four heads."""

HEADS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bert": ("classifier",),
        "deberta-v2": ("classifier", "pooler"),
        "distilbert": ("pre_classifier", "classifier"),
        "gpt2": ("score",),
        "llama": ("score",),
        "modernbert": ("head", "classifier"),
        "roberta": ("classifier",),
        "t5": ("classification_head",),
    }
)
"""Modules of the sequence classification head."""
_OTHERS: Mapping[str, tuple[Any, tuple[str, ...]]] = {  # which classify no texts
    "mamba": (AutoModelForCausalLM, ()),
    "vit": (AutoModelForImageClassification, ("classifier",)),
}


def draw_parameters(parameters: Iterable[nn.Parameter], std: float, seed: int = 0) -> None:
    """Add noise to parameters in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def _build(auto_class: Any, architecture: str, seed: int, options: Mapping[str, Any]) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **{**OPTIONS[architecture], **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(PreTrainedModel, auto_class.from_config(config))
    draw_parameters(model.parameters(), std=0.1, seed=seed)
    model.eval()
    return model


def tiny_model(architecture: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Return a fresh model without a head."""
    return _build(AutoModel, architecture, seed, options)


def tiny_classifier(architecture: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Return a fresh sequence classifier with `LABELS` labels, in evaluation mode."""
    return _build(AutoModelForSequenceClassification, architecture, seed, {"num_labels": LABELS} | options)


def tiny_language_model(architecture: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Return a fresh causal language model, in evaluation mode."""
    return _build(AutoModelForCausalLM, architecture, seed, options)


def tiny_headed(head: HeadSpec, architecture: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a fresh model with the head of a task, in evaluation mode."""
    return _build(head.auto_class, architecture, seed, head.config)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of single words."""
    words = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_chat_tokenizer(*, template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerBase:
    """Return a tokenizer of single words with an end token and, unless it is None, a chat template."""
    special = ["[PAD]", "[UNK]", "<end>", "<user>", "<assistant>"]
    words = [*special, *(f"w{index}" for index in range(VOCABULARY - len(special)))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="<end>",
        additional_special_tokens=special[3:],
    )
    made.chat_template = template
    return made


def tiny_backbone(architecture: str, *, seed: int = 0, new_head: bool = False, **options: Any) -> Backbone:
    """Return a fresh backbone; its head counts as trained unless `new_head`."""
    of_texts = AutoModelForSequenceClassification, HEADS.get(architecture, ("score",))
    auto_class, head = _OTHERS.get(architecture, of_texts)
    return Backbone(
        _build(auto_class, architecture, seed, {"num_labels": LABELS} | options),
        None if architecture == "vit" else tiny_tokenizer(),
        name=f"tiny-{architecture}",
        head=head,
        new_head=new_head,
        auto_class=auto_class,
    )


def batch_of(architecture: str) -> dict[str, Tensor]:
    """Return three rows: images for a ViT, texts for others."""
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels} if architecture == "vit" else tiny_batch()


def tiny_batch(*, rows: int = 3, tokens: int = 9, padding: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids of full length in the first row, with padding on the right in the others."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    input_ids[:, 0], input_ids[:, -1] = 1, 2
    attention_mask = torch.ones(rows, tokens, dtype=torch.long)
    if padding:
        input_ids[1:, -padding:], attention_mask[1:, -padding:] = 0, 0
        input_ids[1:, -padding - 1] = 2
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.no_grad()
def logits_of(backbone: Backbone, batch: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the model's logits in evaluation mode."""
    backbone.model.eval()
    logits: Tensor = backbone.model(**(batch or batch_of(backbone.model.config.model_type))).logits
    return logits


def head_spec(labels: int = LABELS) -> HeadSpec:
    """Return a sequence classification head whose labels have no names."""
    return HeadSpec(auto_class=AutoModelForSequenceClassification, config={"num_labels": labels})


def places(backbone: Backbone, method: str) -> list[Site]:
    """Return every site that can carry a method, at its smallest size where it is one of ours."""
    row = METHOD_SPECS[method]
    smallest = Adapter(method, row.sizes[0] if row.size_name else None)
    return [
        site
        for site, shape in backbone.sites.items()
        if not backbone.obstacle(shape, method)
        and (isinstance(row, PeftSpec) or not METHODS[method].obstacle(shape, smallest))
    ]


def everywhere(backbone: Backbone, method: str, size: int | None = None, **options: Any) -> Configuration:
    """Return a configuration with one method on every site that can carry it, of size 3 or the smallest."""
    row = METHOD_SPECS[method]
    size = size or (row.sizes[0] if isinstance(row, PeftSpec) else 3)
    adapter = Adapter(method, size if row.size_name else None, options)
    return Configuration(dict.fromkeys(places(backbone, method), adapter))


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return all that a model consists of, for comparison before and after.

    Objects are told apart by identity; parameters and buffers by their values as well.
    """
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {
            key: value
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules") and not key.endswith("_hooks")
        }
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        seen[name] = (id(module), type(module).__name__, sorted(own), list(module._modules), hooks)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        flags = id(tensor), tensor.requires_grad, tensor.dtype, tensor.grad is None
        seen[f"{name} (tensor)"] = (*flags, tensor.detach().clone().numpy().tobytes())
    config = getattr(model, "config", None)
    if config is not None:
        seen["config"] = (config.to_json_string(use_diff=False), config._attn_implementation)
    return seen
