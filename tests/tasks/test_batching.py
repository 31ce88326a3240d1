"""Length-bucketed batches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from autopeft.tasks.length_bucketing import (
    Collator,
    LengthGroupedBatches,
    TokenisedSplit,
    loader,
    sorted_batches,
)
from tests.tiny_models import tiny_tokenizer

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300).map(np.array)


def split_of(*rows: list[int]) -> TokenisedSplit:
    offsets = np.cumsum([0, *map(len, rows)])
    tokens = np.array([token for row in rows for token in row])
    labels = np.arange(len(rows))
    return TokenisedSplit({"input_ids": tokens, "token_type_ids": tokens * 0 + 1}, offsets, labels)


@given(lengths=LENGTHS, size=st.integers(1, 40), seed=st.integers(0, 9))
def test_an_epoch_has_every_row_once_and_repeats_by_seed(lengths: np.ndarray, size: int, seed: int) -> None:
    sampler = LengthGroupedBatches(lengths, size, seed)
    epochs = [list(sampler), list(sampler)]
    for batches in epochs:
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert len(batches) == len(sampler)
        assert all(len(batch) <= size for batch in batches)
    again = LengthGroupedBatches(lengths, size, seed)
    assert [list(again), list(again)] == epochs
    again.set_epoch(1)
    assert list(again) == epochs[1]


def test_epochs_and_seeds_differ_and_padding_is_little() -> None:
    lengths = np.random.default_rng(0).integers(4, 60, 1000)
    sampler = LengthGroupedBatches(lengths, 32, 0)
    first, second = list(sampler), list(sampler)
    assert first != second != list(LengthGroupedBatches(lengths, 32, 1))

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * int(lengths[batch].max()) for batch in batches)

    shuffled = np.random.default_rng(0).permutation(1000)
    unsorted = [shuffled[at : at + 32].tolist() for at in range(0, 1000, 32)]
    assert padded(first) < 1.1 * lengths.sum() < 0.7 * padded(unsorted)


def test_evaluation_batches_come_longest_first() -> None:
    batches = sorted_batches(np.array([3, 9, 5, 1]), 3)
    assert batches == [[1, 2, 0], [3]]


def test_the_collator_pads_to_the_longest() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "w7"
    batch = Collator(split_of([5, 6, 7], [8]), tokenizer)([0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].dtype == torch.int64


def test_the_collator_pads_on_the_left_where_the_tokenizer_does() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    collator = Collator(split_of([5, 6, 7], [8]), tokenizer)
    batch = collator([1, 0])
    assert batch["input_ids"].tolist() == [[0, 0, 8], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert collator.positions([1, 0]).tolist() == [[-1, -1, 0], [0, 1, 2]]


def test_the_loader_gives_the_sampler_s_batches() -> None:
    split = split_of([1], [2, 2], [3, 3, 3])
    batches = list(loader(Collator(split, tiny_tokenizer()), [[2, 0], [1]]))
    assert [batch["labels"].tolist() for batch in batches] == [[2, 0], [1]]
