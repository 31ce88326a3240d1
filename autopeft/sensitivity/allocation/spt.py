"""SPT's rule: from where the most sensitive weights lie to the sites that deserve an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from autopeft.core.adapter import Site
from autopeft.core.errors import check_whole
from autopeft.sensitivity.allocation.greedy import fill_evenly
from autopeft.sensitivity.allocation.rank_budget import (
    RankBudget,
    Ranks,
    Scores,
    check_costs,
    check_number,
    checked_scores,
)


def structured(counts: Scores, budget: RankBudget, alpha: float = 5.0, rank: int = 8) -> Ranks:
    """Give the sites that deserve a structured adapter the same rank and the others the smallest.

    The sites are those of `structured_sites`. SPT gives each of them rank 8 and the others a sparse mask;
    here the chosen sites share the whole budget evenly. What they cannot take, or all where none is chosen,
    goes to the site with the most sensitive weights among the others.

    SPT (He et al., ICCV 2023, arXiv:2303.08566).

    Args:
        counts: How many of the most sensitive weights lie at each site, as by `sensitive_counts`.
        budget: What may be spent; its costs must be in parameters.
        alpha: How readily a site is given a structured adapter, above 0.
        rank: The rank whose parameters a site's count is compared with, at least 1.

    Raises:
        ValueError: A number is out of range, a site has no cost, or the budget does not pay for the
            smallest ranks.
    """
    counts = checked_scores(counts, budget)
    return fill_evenly(structured_sites(counts, budget.costs, alpha, rank), counts, budget)


def structured_sites(
    counts: Scores, costs: Mapping[Site, int], alpha: float = 5.0, rank: int = 8
) -> frozenset[Site]:
    """Say at which sites an adapter of low rank beats training the sensitive weights alone.

    Those where count_i ≥ params_i/α, with params_i = rank·cost_i the parameters of LoRA there: where an
    adapter costs at most α times as many parameters as there are sensitive weights.

    SPT (He et al., ICCV 2023, arXiv:2303.08566), with ≥ as in its code.

    Args:
        counts: How many of the most sensitive weights lie at each site.
        costs: The parameters of one rank at each site: d_in + d_out.
        alpha: How readily a site is given a structured adapter, above 0.
        rank: The rank whose parameters a site's count is compared with, at least 1.

    Raises:
        ValueError: alpha or the rank is out of range, there is no site, or a site has no cost.
    """
    check_number("alpha", alpha, lambda value: value > 0, "above 0")
    check_whole("The rank of a structured adapter", rank, least=1)
    check_costs(counts, costs)
    return frozenset(site for site, count in counts.items() if count * alpha >= rank * costs[site])


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
    flat = {site: np.asarray(sensitivities[site]).ravel() for site in sorted(sensitivities)}
    pooled = np.concatenate(list(flat.values())) if flat else np.empty(0)
    if not len(pooled):
        raise ValueError("No weights to select from: expected the sensitivities of at least one site.")
    if np.isnan(pooled).any():
        worst = next(site for site, values in flat.items() if np.isnan(values).any())
        raise ValueError(f"A sensitivity at {worst} is not a number (NaN).")
    if not 0 < count < len(pooled):
        return {site: min(len(values), count) for site, values in flat.items()}
    threshold = np.partition(pooled, -count)[-count]
    counts = {site: int((values > threshold).sum()) for site, values in flat.items()}
    left = count - sum(counts.values())
    for site, values in flat.items():
        equal = min(left, int((values == threshold).sum()))
        counts[site] += equal
        left -= equal
    return counts
