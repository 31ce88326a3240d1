"""Three splits by seed, stratified by label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def stratified_split(labels: Sequence[int], share: float, seed: int) -> tuple[Indices, Indices]:
    """Split rows in two, with each label's share as even as rows allow.

    Args:
        labels: Label of each row.
        share: Share of the second part, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Row numbers of the first and of the second part, both rising. Every label stays in the first
        part; one with a single row is in it alone.
    """
    values = np.asarray(labels)
    generator = np.random.default_rng(seed)
    second: list[Indices] = []
    for label in np.unique(values):
        rows = generator.permutation(np.flatnonzero(values == label))
        count = min(round(share * len(rows)), len(rows) - 1)
        second.append(rows[:count])
    chosen = np.sort(np.concatenate(second))
    rest = np.setdiff1d(np.arange(len(values)), chosen)
    return rest, chosen


def stratified_sample(labels: Sequence[int], count: int, seed: int) -> Indices:
    """Return at most `count` rows, rising, with the labels' shares kept by largest remainder."""
    values = np.asarray(labels)
    if count >= len(values):
        return np.arange(len(values))
    generator = np.random.default_rng(seed)
    kinds, frequency = np.unique(values, return_counts=True)
    exact = frequency * count / len(values)
    quota = np.floor(exact).astype(int)
    for index in np.argsort(quota - exact, kind="stable")[: count - quota.sum()]:
        quota[index] += 1
    rows = [
        generator.permutation(np.flatnonzero(values == kind))[:number]
        for kind, number in zip(kinds, quota, strict=True)
    ]
    return np.sort(np.concatenate(rows))
