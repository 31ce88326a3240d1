"""What a training would take, from a model's config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

import autopeft
from autopeft.core.configuration import Adapter, Configuration
from autopeft.evaluation.estimate import Estimates
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.models.loading import Quantization
from autopeft.tasks import CausalLM
from tests.quantized import QUANTIZATIONS, quantized, quiet, save_base
from tests.slow_cases import slow_cases
from tests.task_cases import TASK_CASES
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import OPTIONS, tiny_chat_tokenizer, tiny_language_model

ROWS, LENGTH, RANK = 3, 17, 4


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with a config alone: no weights, no tokenizer."""
    AutoConfig.for_model("llama", **OPTIONS["llama"]).save_pretrained(tmp_path)
    return tmp_path


def estimates(config: Path, **options: Any) -> Estimates:
    found: Estimates = autopeft.estimate(config, rank=RANK, batch_size=ROWS, length=LENGTH, **options)
    return found


def built(task: CausalLM) -> Backbone:
    model = tiny_language_model("llama")
    nn.Module.to(model, torch.bfloat16)
    return Backbone.load(model, task.head, tiny_chat_tokenizer())


def count(backbone: Backbone, task: CausalLM, trainable_parameters: int) -> int:
    """Return the counted memory of LoRA everywhere, after a look at its number of parameters."""
    linear = [site for site, shape in backbone.sites.items() if shape.kind == "linear"]
    everywhere = Configuration(dict.fromkeys(linear, Adapter("lora", RANK)), learning_rate=1e-3)
    with attach(backbone, everywhere) as attachment:
        assert attachment.trainable_parameters == trainable_parameters
        counter = MemoryCounter(backbone.model)
        return counter.count(task.example_batch(ROWS, LENGTH), task, precision="bf16-mixed")


@pytest.mark.parametrize("checkpointing", [*slow_cases(False), True])
def test_the_estimate_is_the_count_of_a_built_model(config: Path, checkpointing: bool) -> None:
    task = task_of()
    backbone = built(task)
    if checkpointing:
        backbone.enable_checkpointing()
    found = estimates(config, methods=("lora", "layernorm"), checkpointing=checkpointing)
    assert [row.placement for row in found.rows] == ["everywhere", "top half", "top quarter"] * 2
    assert found.parameters == backbone.parameters
    first = found.rows[0]
    assert first.peak_memory == pytest.approx(count(backbone, task, first.trainable_parameters), rel=0.03)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", ["llama", *slow_cases("gpt2")])
@quiet
def test_packed_weights_are_estimated_as_they_are_counted(
    architecture: str, quantization: Quantization, tmp_path: Path
) -> None:
    task = task_of()
    base = save_base(tmp_path / "base", architecture)
    backbone = quantized(base, quantization, task, dtype="bfloat16")
    found = estimates(base, methods=("lora",), **{quantization: True})
    assert found.parameters == backbone.parameters
    first = found.rows[0]
    assert first.peak_memory == pytest.approx(count(backbone, task, first.trainable_parameters), rel=0.03)


@pytest.mark.slow
def test_packed_weights_checkpointing_and_parts_take_less(config: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"nf4": True},
        {"int8": True},
        {"checkpointing": True},
        {"accumulate": ROWS},
    ]
    plain, packed, bytewise, checkpointed, in_parts = (
        estimates(config, methods=("lora",), **each) for each in options
    )
    assert packed.weight_bytes < bytewise.weight_bytes < plain.weight_bytes
    assert packed.rows[0].peak_memory < plain.rows[0].peak_memory
    assert packed.parameters == plain.parameters
    assert packed.rows[0].trainable_parameters == plain.rows[0].trainable_parameters
    assert checkpointed.rows[0].peak_memory < plain.rows[0].peak_memory
    assert in_parts.rows[0].peak_memory < plain.rows[0].peak_memory


def test_fewer_blocks_take_less(config: Path) -> None:
    everywhere, half, quarter = estimates(config, methods="lora").rows
    assert everywhere.peak_memory > half.peak_memory >= quarter.peak_memory
    assert everywhere.trainable_parameters == 2 * half.trainable_parameters


@pytest.mark.slow
def test_what_trains_without_dropout_keeps_no_masks(tmp_path: Path) -> None:
    task = TASK_CASES["PreferenceOptimization"].make()
    rates: list[dict[str, float]] = [{}, {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}]
    peaks = []
    for options in rates:
        AutoConfig.for_model("gpt2", **OPTIONS["gpt2"], **options).save_pretrained(tmp_path)
        peaks.append([row.peak_memory for row in estimates(tmp_path, task=task, methods=("lora",)).rows])
    assert peaks[0] == peaks[1]


def test_a_classifier_has_a_new_head(config: Path) -> None:
    (row, *_) = estimates(config, task="text-classification", methods=("ia3",)).rows
    (without, *_) = estimates(config, methods=("ia3",)).rows
    assert row.trainable_parameters == without.trainable_parameters + 2 * OPTIONS["llama"]["hidden_size"]


def test_the_table_names_families_and_placements(config: Path) -> None:
    text = repr(estimates(config))
    assert all(word in text for word in ("lora(4)", "parallel(4)", "ia3", "everywhere", "top quarter", "MiB"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chat"}, "task 'chat'.*causal-lm"),
        ({"methods": ("lore",)}, "method 'lore'.*lora"),
        ({"rank": 0}, "rank"),
        ({"batch_size": 4, "accumulate": 3}, "accumulate=3 does not cut batch_size=4"),
        ({"nf4": True, "int8": True}, "4 bits or in 8.*both"),
        ({"nf4": True, "methods": ("lora", "full")}, "'full' cannot sit on 0.query.*packed in 4 bits"),
    ],
)
def test_bad_arguments_are_named(config: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autopeft.estimate(config, **options)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_rows_of_more_tokens_than_positions_are_refused(architecture: str, tmp_path: Path) -> None:
    AutoConfig.for_model(architecture, **OPTIONS[architecture]).save_pretrained(tmp_path)
    task = "causal-lm" if architecture == "gpt2" else "text-classification"
    with pytest.raises(ValueError, match=r"has learnt 64 positions, and rows have up to 65 tokens"):
        autopeft.estimate(tmp_path, task, length=65)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
        autopeft.estimate(tmp_path)
