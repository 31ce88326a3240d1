"""Where the most sensitive weights of a backbone lie, for the allocator "structured"."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from autopeft.core.adapter import Site
from autopeft.core.errors import check_whole


def sensitive_counts(sensitivities: Mapping[Site, ArrayLike], count: int) -> dict[Site, int]:
    """Count how many of the globally most sensitive weights lie at each site.

    SPT (He et al., ICCV 2023, arXiv:2303.08566): a weight's sensitivity is Σ g² over batches, and the τ
    weights with the highest are selected. Equal sensitivities go to the earlier site.

    Args:
        sensitivities: The sensitivity of each weight of a site, of any shape and in any order. The `count`
            highest of each site are enough.
        count: τ, how many weights to select, at least 0; all of them where there are fewer.

    Raises:
        ValueError: There are no weights, the count is negative, or a sensitivity is not a number.
    """
    check_whole("The count of sensitive weights", count, least=0)
    flat = {site: np.asarray(sensitivities[site], dtype=float).ravel() for site in sorted(sensitivities)}
    sizes = [len(values) for values in flat.values()]
    if not sum(sizes):
        raise ValueError("No weights to select from: expected the sensitivities of at least one site.")
    for site, values in flat.items():
        if np.isnan(values).any():
            raise ValueError(f"A sensitivity at {site} is not a number (NaN).")
    highest = np.argsort(-np.concatenate(list(flat.values())), kind="stable")[:count]
    site_of_weight = np.repeat(np.arange(len(flat)), sizes)
    counts = np.bincount(site_of_weight[highest], minlength=len(flat))
    return dict(zip(flat, counts.tolist(), strict=True))
