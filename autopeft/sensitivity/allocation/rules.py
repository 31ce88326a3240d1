"""Allocation rules, as published, adjusted to spend the whole budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopeft.core.adapter import Site
from autopeft.core.errors import check_numbers
from autopeft.sensitivity.allocation.rank_budget import (
    DECIMALS,
    Priority,
    RankBudget,
    Ranks,
    bounded_shares,
    by_largest_remainder,
    greedy_allocate,
)
from autopeft.sensitivity.allocation.registry import allocator

_Scores = Mapping[Site, float]
_Spectra = Mapping[Site, tuple[float, ...]]


@allocator("scores")
def proportional(scores: _Scores, budget: RankBudget, temperature: float = 1.0) -> Ranks:
    """Divide in proportion to a power of the scores, by largest remainder.

    r_i = clip(λ·s_i^τ, smallest, largest), with λ such that Σ cost_i·r_i is the budget: what the bounds
    take or leave is divided among the other sites in proportion again. Scores that are all 0 count as equal.
    At a temperature τ of 0 all sites get the same rank; the larger it is, the more goes to the best.
    """
    check_numbers(least=0, temperature=temperature)
    weights = {site: weight**temperature for site, weight in _weights(scores).items()}
    return by_largest_remainder(bounded_shares(weights, budget), weights, budget)


@allocator("scores")
def gora(scores: _Scores, budget: RankBudget) -> Ranks:
    """Divide the budget itself in proportion to the scores, whatever a rank costs.

    r_i = clip(⌊B·s_i / (Σs·cost_i)⌋, smallest, largest): of two sites that score the same, the one where a
    rank costs half gets twice the rank, which `proportional` does not do. GoRA (He et al., arXiv:2502.12171),
    with its score "gora"; what the paper leaves unspent, or overspends, goes by largest remainder.
    """
    weights = _weights(scores)
    whole = sum(weights.values())
    shares = {site: budget.total * weight / whole / budget.costs[site] for site, weight in weights.items()}
    return by_largest_remainder(shares, weights, budget)


@allocator("scores")
def fisher(scores: _Scores, budget: RankBudget) -> Ranks:
    """Divide ranks in proportion to the scores, clamp once, and round by largest remainder.

    r_i = clip(N·s_i / Σs, smallest, largest), where N is the sum of ranks that the budget buys in these
    shares. What the bounds leave or take is spread evenly over the other sites.

    "FIM-guided adaptive LoRA rank allocation" (proposal, github.com/huggingface/peft/issues/3203), with the
    score "fisher".
    """
    weights = _weights(scores)
    whole = sum(budget.costs[site] * weight for site, weight in weights.items())
    shares = {site: budget.total * weight / whole for site, weight in weights.items()}
    return by_largest_remainder(shares, weights, budget)


@allocator("scores")
def top_k(scores: _Scores, budget: RankBudget, share: float = 0.5) -> Ranks:
    """Give the best sites the same rank and the others the smallest.

    The best ⌈share·n⌉ of n sites are filled evenly, the better ones first. The next best site gets what
    they cannot take. Layer-wise placement as in "On Surgical Fine-tuning for Language Encoders" (Lodha et
    al., EMNLP Findings 2023).
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be a number above 0 and at most 1, got {share!r}.")
    ranking = sorted(scores, key=lambda site: (-scores[site], site))
    # A share of k/n chooses k sites, though k/n·n may come out just above k.
    chosen = frozenset(ranking[: math.ceil(round(share * len(ranking), DECIMALS)) or 1])
    return greedy_allocate(
        scores,
        budget,
        lambda site, rank: (1, -rank, scores[site]) if site in chosen else (0, scores[site], -rank),
    )


@allocator("spectra")
def explained_variance(spectra: _Spectra, budget: RankBudget, rho: float = 2.0) -> Ranks:
    """Keep the components that explain most of the variance of their site's inputs.

    The components of all sites are pooled, and as many as the budget pays for are kept, highest
    explained-variance ratio first, of equal ratios the one at the lower rank. A site's rank is how many of
    its components are kept; it is capped at ⌈ρ·r⌉, with r = B / Σ cost_i the rank that all sites could have.
    Components that are not given explain nothing: they are kept last.

    EVA (Paischer et al., arXiv:2410.07170).
    """
    check_numbers(least=1, rho=rho)
    uniform_rank = budget.total / sum(budget.costs[site] for site in spectra)
    # Rounded up: rounded down, the caps could add up to less than the budget.
    cap = min(budget.largest, max(budget.smallest, math.ceil(round(rho * uniform_rank, DECIMALS))))
    return greedy_allocate(
        spectra, budget, lambda site, rank: (_component(spectra[site], rank), -rank), largest=cap
    )


@allocator("spectra")
def water_filling(spectra: _Spectra, budget: RankBudget) -> Ranks:
    """Keep the components that gain most for what they cost: the knapsack over all sites' spectra.

    Maximises Σ_i Σ_{k ≤ r_i} σ_ik² subject to Σ cost_i·r_i ≤ B: how much of the squared norm of the
    gradients adapters of these ranks can follow (Eckart and Young, Psychometrika 1936). Ranks are granted
    by σ²/cost, highest first. At equal costs this is exact; otherwise it misses the optimum by less than the
    gain of the first component that cannot be paid (Dantzig, Operations Research 1957).

    The spectra are the singular values σ of each site, as of the score "gradient_spectrum". Components that
    are not given gain nothing.
    """
    # Relative to the largest, squares do not overflow, and only what is negligible vanishes.
    unit = max(_component(spectrum, 0) for spectrum in spectra.values()) or 1.0

    def gain_for_cost(site: Site, rank: int) -> Priority:
        return (_component(spectra[site], rank) / unit) ** 2 / budget.costs[site], -rank

    return greedy_allocate(spectra, budget, gain_for_cost)


def _weights(scores: _Scores) -> dict[Site, float]:
    """Return the scores relative to the highest; 1 everywhere where all are 0, for want of a preference."""
    best = max(scores.values())
    return {site: score / best if best else 1.0 for site, score in scores.items()}


def _component(spectrum: tuple[float, ...], rank: int) -> float:
    return spectrum[rank] if rank < len(spectrum) else 0.0
