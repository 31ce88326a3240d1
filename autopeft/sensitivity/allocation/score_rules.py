"""Allocators that read one number a site."""

from __future__ import annotations

import math

from autopeft.core.adapter import Site
from autopeft.sensitivity.allocation.greedy import DECIMALS, bounded_shares, by_largest_remainder, fill_evenly
from autopeft.sensitivity.allocation.rank_budget import (
    RankBudget,
    Ranks,
    Scores,
    check_number,
    checked_scores,
)


def proportional(scores: Scores, budget: RankBudget, temperature: float = 1.0) -> Ranks:
    """Divide in proportion to a power of the scores, by largest remainder.

    r_i = clip(λ·s_i^τ, smallest, largest), with λ such that Σ cost_i·r_i is the budget: what the bounds
    take or leave is divided among the other sites in proportion again.

    Args:
        scores: How much each site promises, at least 0. All zero counts as all equal.
        budget: What may be spent.
        temperature: τ, at least 0. At 0 all sites get the same rank, at 1 ranks are as the scores, and the
            larger it is, the more goes to the best.

    Raises:
        ValueError: A score or the temperature is out of range, a site has no cost, or the budget does not
            pay for the smallest ranks.
    """
    check_number("temperature", temperature, lambda value: value >= 0, "of at least 0")
    weights = {site: weight**temperature for site, weight in _weights(scores, budget).items()}
    return by_largest_remainder(bounded_shares(weights, budget), weights, budget)


def gora(scores: Scores, budget: RankBudget) -> Ranks:
    """Divide the budget itself in proportion to the scores, whatever a rank costs.

    r_i = clip(⌊B·s_i / (Σs·cost_i)⌋, smallest, largest): of two sites that score the same, the one where a
    rank costs half gets twice the rank, which `proportional` does not do. The paper leaves unspent, or
    overspends, what the rounding and the bounds change; here it goes by largest remainder.

    GoRA (He et al., arXiv:2502.12171), with B = Σ (d_in + d_out)·r. The paper rounds each share to whole
    parameters before it divides, which is left out: with costs of 1 it would undo the largest remainder.

    Args:
        scores: How much each site promises, at least 0; the paper's is the score "gora".
        budget: What may be spent.

    Raises:
        ValueError: A score is out of range, a site has no cost, or the budget does not pay for the
            smallest ranks.
    """
    weights = _weights(scores, budget)
    whole = sum(weights.values())
    shares = {site: budget.total * weight / whole / budget.costs[site] for site, weight in weights.items()}
    return by_largest_remainder(shares, weights, budget)


def fisher(scores: Scores, budget: RankBudget) -> Ranks:
    """Divide ranks in proportion to the scores, clamp once, and round by largest remainder.

    r_i = clip(N·s_i / Σs, smallest, largest), where N is the sum of ranks that the budget buys in these
    shares: n·r for costs of 1. What the bounds leave or take is spread evenly over the other
    sites, where `proportional` divides it in proportion to their scores.

    "FIM-guided adaptive LoRA rank allocation" (proposal, github.com/huggingface/peft/issues/3203).

    Args:
        scores: How much each site promises, at least 0; the proposal's is the score "fisher".
        budget: What may be spent.

    Raises:
        ValueError: A score is out of range, a site has no cost, or the budget does not pay for the
            smallest ranks.
    """
    weights = _weights(scores, budget)
    whole = sum(budget.costs[site] * weight for site, weight in weights.items())
    shares = {site: budget.total * weight / whole for site, weight in weights.items()}
    return by_largest_remainder(shares, weights, budget)


def top_k(scores: Scores, budget: RankBudget, share: float = 0.5) -> Ranks:
    """Give the best sites the same rank and the others the smallest.

    The best ⌈share·n⌉ of n sites are filled evenly, the better ones first. The next best site gets what
    they cannot take.

    Layer-wise placement as in "On Surgical Fine-tuning for Language Encoders" (Lodha et al., EMNLP
    Findings 2023).

    Args:
        scores: How much each site promises, at least 0.
        budget: What may be spent.
        share: The share of the sites to choose, above 0 and at most 1.

    Raises:
        ValueError: A score or the share is out of range, a site has no cost, or the budget does not pay for
            the smallest ranks.
    """
    check_number("share", share, lambda value: 0 < value <= 1, "above 0 and at most 1")
    scores = checked_scores(scores, budget)
    ranking = sorted(scores, key=lambda site: (-scores[site], site))
    # A share of k/n chooses k sites, though k/n·n may come out just above k.
    chosen = frozenset(ranking[: math.ceil(round(share * len(ranking), DECIMALS)) or 1])
    return fill_evenly(chosen, scores, budget)


def _weights(scores: Scores, budget: RankBudget) -> dict[Site, float]:
    """Return the scores relative to the highest; 1 everywhere where all are 0, for want of a preference."""
    scores = checked_scores(scores, budget)
    best = max(scores.values())
    return {site: score / best if best else 1.0 for site, score in scores.items()}
