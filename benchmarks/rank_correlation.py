"""Rank correlation of two lists of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from scipy import stats


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 if either list is constant."""
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)
