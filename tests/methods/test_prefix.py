from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.methods import Attachment, attach, count_site
from autopeft.methods.prefix_tuning import Prefix, prefix_attention
from autopeft.models.backbone import Backbone
from tests.tiny_models import (
    draw_parameters,
    head_spec,
    logits_of,
    tiny_backbone,
    tiny_batch,
    tiny_model,
    tiny_tokenizer,
)

BATCH, HEADS, TOKENS, WIDTH, LENGTH = 3, 4, 6, 8, 5


class Host(nn.Module):
    """What an attention module is to the attention interface."""

    def __init__(self, groups: int, is_causal: bool) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = is_causal
        self.eval()


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor, prefix: Prefix, visible: Tensor) -> Tensor:
    """Attend to [prefix; keys] token by token; `visible` is (batch, tokens, keys) without the prefix."""
    batch, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    output = torch.zeros(batch, tokens, heads, width)
    for row in range(batch):
        for head in range(heads):
            shared = head * key_heads // heads
            columns = slice(shared * width, (shared + 1) * width)
            keys = torch.cat([prefix.key[:, columns], key[row, shared]])
            values = torch.cat([prefix.value[:, columns], value[row, shared]])
            for token in range(tokens):
                scores = keys @ query[row, head, token] / math.sqrt(width)
                seen = torch.cat([torch.ones(len(prefix.key), dtype=torch.bool), visible[row, token]])
                weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=0)
                output[row, token, head] = weights @ values
    return output


@pytest.mark.parametrize("mask_kind", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@torch.no_grad()
def test_attends_to_prefix_and_tokens(groups: int, causal: bool, mask_kind: str) -> None:
    host = Host(groups, causal)
    key_heads = HEADS // groups
    prefix = Prefix(LENGTH, key_heads * WIDTH, initial_std=1.0)
    host.add_module("autopeft_prefix", prefix)
    query = torch.randn(BATCH, HEADS, TOKENS, WIDTH)
    key, value = torch.randn(2, BATCH, key_heads, TOKENS, WIDTH)
    visible = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)
    if causal:
        visible = visible.tril()
    mask = None
    if mask_kind != "none":
        visible = visible.clone()
        visible[1, :, -2:] = False  # padding
        mask = visible[:, None]
        if mask_kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    output, _ = prefix_attention(host, query, key, value, mask, scaling=WIDTH**-0.5)
    torch.testing.assert_close(output, _softmax_attention(query, key, value, prefix, visible))


@torch.no_grad()
def test_one_new_token_behind_a_cache_sees_everything() -> None:
    host = Host(groups=1, is_causal=True)
    prefix = Prefix(LENGTH, HEADS * WIDTH, initial_std=1.0)
    host.add_module("autopeft_prefix", prefix)
    key, value = torch.randn(2, BATCH, HEADS, TOKENS, WIDTH)
    for new in (1, 2):
        query = torch.randn(BATCH, HEADS, new, WIDTH)
        output, _ = prefix_attention(host, query, key, value, None)
        visible = torch.ones(BATCH, new, TOKENS, dtype=torch.bool).tril(TOKENS - new)
        torch.testing.assert_close(output, _softmax_attention(query, key, value, prefix, visible))


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_the_callers_word_on_causality_counts(causal: bool) -> None:
    """GPT-2 passes `is_causal`; it overrides the module's."""
    host = Host(groups=1, is_causal=not causal)
    prefix = Prefix(LENGTH, HEADS * WIDTH, initial_std=1.0)
    host.add_module("autopeft_prefix", prefix)
    query, key, value = torch.randn(3, BATCH, HEADS, TOKENS, WIDTH)
    output, _ = prefix_attention(host, query, key, value, None, is_causal=causal)
    visible = torch.ones(BATCH, TOKENS, TOKENS, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    torch.testing.assert_close(output, _softmax_attention(query, key, value, prefix, visible))


def _drawn(backbone: Backbone, lengths: dict[int, int]) -> Attachment:
    configuration = Configuration(
        {Site(block, "attention"): Adapter("prefix", length) for block, length in lengths.items()}
    )
    attachment = attach(backbone, configuration)
    prefixes = [parameter for name, parameter in attachment.parameters.items() if ".prefix." in name]
    draw_parameters(prefixes, std=1.0)
    return attachment


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_a_decoder_computes_what_it_does_with_past_keys_and_values(architecture: str, padding: int) -> None:
    backbone = tiny_backbone(architecture)
    batch = tiny_batch(padding=padding)
    rows, tokens = batch["input_ids"].shape
    with _drawn(backbone, {0: LENGTH, 1: LENGTH}) as attachment:
        found = logits_of(backbone, batch)
        state = attachment.state_dict()
    width = backbone.shape(Site(0, "attention")).key_value_features
    heads = width // WIDTH
    cache = DynamicCache(config=backbone.model.config)
    for block in range(2):
        past = [
            state[f"{block}.attention.prefix.{name}"]
            .view(LENGTH, heads, WIDTH)
            .transpose(0, 1)
            .expand(rows, -1, -1, -1)
            for name in ("key", "value")
        ]
        cache.update(past[0], past[1], block)
    visible = torch.cat([torch.ones(rows, LENGTH, dtype=torch.long), batch["attention_mask"]], dim=1)
    expected = backbone.model(
        input_ids=batch["input_ids"],
        attention_mask=visible,
        past_key_values=cache,
        position_ids=torch.arange(tokens)[None].expand(rows, -1),
    ).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
@torch.no_grad()
def test_an_encoder_attends_to_prefix_and_unpadded_tokens(architecture: str, padding: int) -> None:
    backbone = tiny_backbone(architecture)
    batch = tiny_batch(padding=padding)
    shapes = {role: backbone.shape(Site(1, role)) for role in ("query", "key", "value")}
    kept: dict[str, Tensor] = {}

    def keep(role: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            rows, tokens, _ = output.shape
            kept[role] = output.view(rows, tokens, HEADS, WIDTH).transpose(1, 2)

        return hook

    def keep_attended(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept["attended"] = inputs[0]

    model = backbone.model
    handles = [
        model.get_submodule(shape.module).register_forward_hook(keep(role)) for role, shape in shapes.items()
    ]
    projection = model.get_submodule(backbone.shape(Site(1, "attention_output")).module)
    handles.append(projection.register_forward_pre_hook(keep_attended))
    with _drawn(backbone, {1: LENGTH}):
        logits_of(backbone, batch)
        prefix = model.get_submodule(backbone.shape(Site(1, "attention")).attention_module).get_submodule(
            "autopeft_prefix"
        )
        assert isinstance(prefix, Prefix)
        rows, tokens = batch["input_ids"].shape
        visible = batch["attention_mask"].bool()[:, None].expand(rows, tokens, tokens)
        expected = _softmax_attention(kept["query"], kept["key"], kept["value"], prefix, visible)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(kept["attended"], expected.flatten(2))


@torch.no_grad()
def test_each_block_has_its_own_length_or_none() -> None:
    backbone = tiny_backbone("llama", num_hidden_layers=3)
    hidden: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in backbone.blocks]
    logits_of(backbone)
    with _drawn(backbone, {1: 2, 2: 7}) as attachment:
        assert attachment.parameters["1.attention.prefix.key"].shape == (2, 16)
        assert attachment.parameters["2.attention.prefix.value"].shape == (7, 16)
        logits_of(backbone)
    for handle in handles:
        handle.remove()
    same = [torch.equal(before, after) for before, after in zip(hidden[:3], hidden[3:], strict=True)]
    assert same == [True, False, False]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_models_own_attention_comes_back(implementation: str) -> None:
    backbone = tiny_backbone("bert", attn_implementation=implementation)
    assert backbone.model.config._attn_implementation == implementation
    before = logits_of(backbone)
    with attach(backbone, Configuration({Site(1, "attention"): Adapter("prefix", 2)})):
        assert backbone.model.config._attn_implementation == "autopeft_prefix"
    assert backbone.model.config._attn_implementation == implementation
    assert torch.equal(logits_of(backbone), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_reaches_a_model_that_was_given_a_head(implementation: str) -> None:
    base = tiny_model("bert", attn_implementation=implementation)
    backbone = Backbone.load(base, head_spec(), tiny_tokenizer())
    configurations = {
        id(module.config): module.config
        for module in backbone.model.modules()
        if isinstance(module, PreTrainedModel)
    }
    before = logits_of(backbone)
    with _drawn(backbone, {0: 3}):
        assert not torch.allclose(logits_of(backbone), before, atol=1e-4)
    for config in configurations.values():
        assert config._attn_implementation == implementation
    assert torch.equal(logits_of(backbone), before)


@pytest.mark.parametrize("stack", ["vision", "text"])
def test_of_a_composite_model_one_stack_is_rerouted_and_each_gets_its_own_attention_back(stack: str) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 64, **tower},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **tower},
        image_token_index=5,
    )
    own = {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=own)
    backbone = Backbone(model, None, name="llava", head=())

    def implementations() -> dict[str, str]:
        parts = {name: getattr(model.config, name) for name in own if name}
        return {name: part._attn_implementation for name, part in {"": model.config, **parts}.items()}

    with attach(backbone, Configuration({Site(1, "attention", stack): Adapter("prefix", 2)})):
        assert implementations() == own | {f"{stack}_config": "autopeft_prefix"}
    assert implementations() == own


def test_starts_near_zero() -> None:
    backbone = tiny_backbone("bert")
    site = Site(0, "attention")
    for std in (0.02, 0.5):
        adapter = Adapter("prefix", 200, {"initial_std": std})
        with attach(backbone, Configuration({site: adapter})) as attachment:
            for name in ("key", "value"):
                drawn = attachment.parameters[f"{site}.prefix.{name}"]
                assert drawn.shape == (200, 32)
                assert float(drawn.detach().std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "width"), [("bert", 32), ("llama", 16), ("gpt2", 32), ("modernbert", 32)]
)
def test_count_follows_the_key_heads(architecture: str, width: int) -> None:
    backbone = tiny_backbone(architecture)
    assert count_site(backbone, Site(0, "attention"), Adapter("prefix", 7)) == 2 * 7 * width


@torch.no_grad()
def test_follows_the_models_precision() -> None:
    backbone = tiny_backbone("llama")
    backbone.model.bfloat16()
    with _drawn(backbone, {0: 3}), torch.autocast("cpu", torch.bfloat16):
        assert logits_of(backbone).dtype == torch.bfloat16
