"""Short rows in packs of one length: tight, and without a look at each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from autopeft.tasks.batch import IGNORED, POSITIONS
from autopeft.tasks.language_rows import TokenRow
from autopeft.tasks.packing import pack
from tests.quantized import QUANTIZATIONS, quantized, quiet, save_base
from tests.slow_cases import slow_cases
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

LENGTH = 64


def row_of(number: int, length: int) -> TokenRow:
    tokens = (number,) * length
    return TokenRow(tokens, tokens, 0, ())


def packs_of_first_fit(lengths: list[int]) -> int:
    """Return how many packs there are where each row goes into the first with room, the longest first."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((index for index, left in enumerate(room) if left >= length), len(room))
        room += [LENGTH] * (place == len(room))
        room[place] -= length
    return len(room)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [8, 40, LENGTH])
def test_packs_are_as_tight_as_by_first_fit_and_have_every_row_whole(longest: int, seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, longest + 1, 300).tolist()
    split = pack([row_of(number, length) for number, length in enumerate(lengths)], LENGTH)
    assert split.lengths.max() <= LENGTH
    assert len(split) <= packs_of_first_fit(lengths)
    ids, starts = split.tokens["input_ids"], np.flatnonzero(split.tokens[POSITIONS] == 0)
    found = {int(part[0]): len(part) for part in np.split(ids, starts[1:])}
    assert found == dict(enumerate(lengths))
    assert set(split.offsets[:-1]) <= set(starts)
    assert (split.labels[starts] == IGNORED).all()


def check(model: Any, batch_size: int = 3) -> None:
    """Let a task with packing look at a model."""
    task = task_of(packing=True)
    data = task.data(tiny_chat_tokenizer(), batch_size=batch_size, seed=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        task.check_model(model, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", *slow_cases("gemma2", "qwen3_moe")])
def test_models_that_keep_rows_apart_are_taken(architecture: str, dtype: torch.dtype) -> None:
    check(tiny_language_model(architecture).to(dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", slow_cases(*QUANTIZATIONS))
@quiet
def test_quantised_models_that_keep_rows_apart_are_taken(quantization: Any, tmp_path: Any) -> None:
    check(quantized(save_base(tmp_path), quantization, task_of()).model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "architecture",
    ["mpt", "mamba2", *slow_cases("bloom", "falcon", "gpt_oss", "jamba", "mamba", "opt", "rwkv")],
)
def test_models_that_mix_packed_rows_are_refused(architecture: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"Packed rows see each other in .*: expected packing=False"):
        check(tiny_language_model(architecture).to(dtype))  # type: ignore[arg-type]


def test_an_attention_that_takes_rows_apart_in_single_packs_alone_needs_these() -> None:
    """As flash attention does in transformers: of more packs it sees no boundaries."""

    def single(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        positions = options["position_ids"]
        if len(query) == 1:
            rows = (positions == 0).cumsum(-1)
            mask = (rows.unsqueeze(-1) == rows.unsqueeze(-2)).tril().unsqueeze(1)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("single packs", single)
    model = tiny_language_model("llama")
    model.set_attn_implementation("single packs")
    check(model, batch_size=1)
    with pytest.raises(ValueError, match=r"Packed rows see each other in LlamaForCausalLM"):
        check(model)
