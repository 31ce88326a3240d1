"""Splits and limits: disjoint, complete, stratified, by seed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autopeft.tasks.splits import stratified_sample, stratified_split

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=200)


@given(labels=LABELS, share=st.floats(0.01, 0.9), seed=st.integers(0, 99))
def test_a_split_is_disjoint_complete_and_stratified(labels: list[int], share: float, seed: int) -> None:
    first, second = stratified_split(labels, share, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label in set(labels):
        rows = labels.count(label)
        taken = sum(labels[row] == label for row in second)
        assert taken == min(round(share * rows), rows - 1)
    again = stratified_split(labels, share, seed)
    assert all(np.array_equal(one, other) for one, other in zip((first, second), again, strict=True))


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
