"""Three splits by seed, stratified by label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_FEWEST = 2


def stratified_split(labels: Sequence[int], share: float, seed: int) -> tuple[Indices, Indices]:
    """Split rows in two, with each label's share as even as rows allow.

    Args:
        labels: Label of each row.
        share: Share of the second part, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Row numbers of the first and of the second part, both rising. Every label stays in the first
        part; one with a single row is in it alone. The second part has its share of the rows, and two
        labels at least where that leaves the first part all of them.
    """
    values = np.asarray(labels)
    kinds, frequency = np.unique(values, return_counts=True)
    total = max(round(share * len(values)), _FEWEST)
    quota = _quotas(share * frequency, total, frequency - 1, seed)
    spare = np.flatnonzero((quota == 0) & (frequency > 1))
    if np.count_nonzero(quota) < _FEWEST and len(spare):
        # A part of one label measures nothing; one more row is the lesser harm.
        quota[spare[np.argmax(frequency[spare])]] = 1
    chosen = _drawn(values, kinds, quota, seed)
    return np.setdiff1d(np.arange(len(values)), chosen), chosen


def stratified_sample(labels: Sequence[int], count: int, seed: int) -> Indices:
    """Return at most `count` rows, rising, with the labels' shares as even as rows allow."""
    values = np.asarray(labels)
    if count >= len(values):
        return np.arange(len(values))
    kinds, frequency = np.unique(values, return_counts=True)
    quota = _quotas(frequency * count / len(values), count, frequency, seed)
    return _drawn(values, kinds, quota, seed)


def _quotas(exact: NDArray[np.floating[Any]], total: int, most: Indices, seed: int) -> Indices:
    """Round shares of rows, by label, so that they sum to `total` where `most` of each allows.

    Each is rounded down, and the rows that are left go one each to labels: first to those that would
    otherwise have none, so that rare ones are there, then by largest remainder. Equals are drawn by seed:
    else the same of many rare labels would be left out of every part.
    """
    exact = exact.round(9)  # 0.1 * 30 is a little more than 3, and other products a little less
    quota: Indices = np.minimum(np.floor(exact), most).astype(np.int64)
    chance = np.random.default_rng((seed, 1)).random(len(exact))
    order = np.lexsort((chance, quota - exact, quota > 0))
    able = order[quota[order] < most[order]]
    quota[able[: max(0, total - int(quota.sum()))]] += 1
    return quota


def _drawn(values: NDArray[np.int64], kinds: NDArray[np.int64], quota: Indices, seed: int) -> Indices:
    """Return as many rows of each label as its quota says, rising."""
    generator = np.random.default_rng(seed)
    rows = [
        generator.permutation(np.flatnonzero(values == kind))[:number]
        for kind, number in zip(kinds, quota, strict=True)
    ]
    return np.sort(np.concatenate(rows))
