"""Splits and limits: disjoint, complete, stratified, by seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autopeft.tasks.splits import stratified_sample, stratified_split

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=200)


@example(labels=[0, 0, 1, 3, 3, 4], share=0.25, seed=1)
@given(labels=LABELS, share=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_a_split_is_disjoint_complete_and_stratified(labels: list[int], share: float, seed: int) -> None:
    first, second = stratified_split(labels, share, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert {labels[row] for row in first} == set(labels)
    asked = min(max(round(share * len(labels)), 2), len(labels))
    for label in set(labels):
        rows = labels.count(label)
        exact = rows * asked / len(labels)
        taken = sum(labels[row] == label for row in second)
        assert min(math.floor(exact), rows - 1) <= taken <= min(math.floor(exact) + 1, rows - 1)
    repeated = sum(labels.count(label) > 1 for label in set(labels))
    assert len({labels[row] for row in second}) >= min(2, repeated)
    assert asked - len(set(labels)) <= len(second) <= asked + 1
    again = stratified_split(labels, share, seed)
    assert all(np.array_equal(part, other) for part, other in zip((first, second), again, strict=True))


@pytest.mark.parametrize(
    ("labels", "rows", "kinds"),
    [
        (list(range(50)) * 4, 20, 20),
        ([0, 1] * 4, 2, 2),
        ([0] * 900 + list(range(1, 26)) * 4, 100, 11),
        ([0] * 96 + [1] * 4, 10, 2),
        ([0] * 1000 + [1] * 4, 100, 2),
        ([0] * 99 + [1], 10, 1),
    ],
)
def test_a_split_has_its_share_of_rows_and_rare_labels(labels: list[int], rows: int, kinds: int) -> None:
    """Rounded a label at a time, rare ones would vanish and many of them leave no rows at all."""
    for seed in range(5):
        first, second = stratified_split(labels, 0.1, seed)
        assert len({labels[row] for row in second}) in (kinds, kinds - (kinds > 2))
        assert rows - 1 <= len(second) <= rows + 1
        assert {labels[row] for row in first} == set(labels)


def test_equally_rare_labels_take_turns() -> None:
    labels = list(range(50)) * 4
    found = {frozenset(labels[row] for row in stratified_split(labels, 0.1, seed)[1]) for seed in range(3)}
    assert len(found) == 3


def test_another_seed_splits_otherwise() -> None:
    labels = [0, 1] * 50
    assert not np.array_equal(stratified_split(labels, 0.3, 0)[1], stratified_split(labels, 0.3, 1)[1])


@given(labels=LABELS, count=st.integers(1, 250), seed=st.integers(0, 99))
def test_a_sample_keeps_the_shares(labels: list[int], count: int, seed: int) -> None:
    rows = stratified_sample(labels, count, seed)
    assert len(rows) == len(set(rows)) == min(count, len(labels))
    if count < len(labels):
        for label in set(labels):
            exact = labels.count(label) * count / len(labels)
            assert abs(sum(labels[row] == label for row in rows) - exact) < 1
