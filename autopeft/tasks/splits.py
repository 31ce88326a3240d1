"""Rows drawn by seed, stratified by label.

By systematic sampling rather than by datasets' or scikit-learn's stratified splits, which refuse labels of a
single row, and more labels than the smaller part has rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_FEWEST = 2
_logger = logging.getLogger(__name__)


def stratified_split(labels: Sequence[int], share: float, seed: int) -> tuple[Indices, Indices]:
    """Split rows in two, with each label's share as even as rows allow.

    Args:
        labels: Label of each row.
        share: Share of the second part, in (0, 1).
        seed: Seed of the choice.

    Returns:
        Row numbers of the first and of the second part, both rising. Every label stays in the first part,
        also one of a single row. The second part has two labels at least where that
        leaves the first part all.
    """
    values = np.asarray(labels)
    chosen = stratified_sample(labels, max(round(share * len(values)), _FEWEST), seed)
    kinds, first, taken = np.unique(values[chosen], return_index=True, return_counts=True)
    whole = [np.count_nonzero(values == kind) == number for kind, number in zip(kinds, taken, strict=True)]
    chosen = np.delete(chosen, first[whole])
    present = np.unique(values[chosen])
    if len(present) < _FEWEST:
        # A part of one label measures nothing; one more row is the lesser harm.
        kinds, frequency = np.unique(values[~np.isin(values, present)], return_counts=True)
        spare = np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(values, kinds[frequency > 1])))
        _, first = np.unique(values[spare], return_index=True)
        chosen = np.append(chosen, spare[np.sort(first)][: _FEWEST - len(present)])
    return np.setdiff1d(np.arange(len(values)), chosen), np.sort(chosen)


def stratified_sample(labels: Sequence[int], count: int, seed: int) -> Indices:
    """Return at most `count` rows, rising; of each label its share of them, rounded up or down.

    A systematic sample: rows in random order, grouped by label, every n-th of them.
    """
    values = np.asarray(labels)
    if count >= len(values):
        return np.arange(len(values))
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(values))
    # Labels in random order too: else the same of many rare ones would be left out of every part.
    rank = generator.permutation(int(values.max()) + 1)
    rows = rows[np.argsort(rank[values[rows]], kind="stable")]
    places = (np.arange(count) + generator.random()) * len(values) / count
    return np.sort(rows[places.astype(np.int64)])


def split_groups(groups: Sequence[Hashable], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Split rows in two, with all rows of a group in one part.

    Args:
        groups: Group of each row.
        count: Rows of the second part, about: it is filled group by group, and leaves the first part one.
        seed: Seed of the choice.

    Returns:
        Row numbers of the first and of the second part, both rising.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    parts = list(members.values())
    taken: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(parts))[:-1]:
        if len(taken) >= count:
            break
        taken += parts[index]
    return sorted(set(range(len(groups))) - set(taken)), sorted(taken)


def three_parts(
    sizes: Mapping[str, int],
    shares: Mapping[str, float],
    cut: Callable[[Sequence[int], float], tuple[Sequence[int], Sequence[int]]],
) -> dict[str, tuple[str, Sequence[int]]]:
    """Say which rows of which split of a source make train, validation and test.

    Where the source has no test split, its validation split is held out as test.

    Args:
        sizes: Rows of each split of the source.
        shares: Shares of the training rows that become "test" and "validation" where there is none.
        cut: Splits training rows in two, the second part of about a share of them: places in both parts.
    """
    parts: dict[str, tuple[str, Sequence[int]]] = {name: (name, range(size)) for name, size in sizes.items()}
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
        _logger.info("There is no test split with labels: the validation split is held out as test.")
    all_rows = len(parts["train"][1])
    for name, share in shares.items():
        if name not in parts:
            rows = parts["train"][1]
            kept, taken = cut(rows, share * all_rows / len(rows))
            parts["train"] = "train", [rows[place] for place in kept]
            parts[name] = "train", [rows[place] for place in taken]
    return parts
