"""Allocators that read what each further rank at a site adds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from autopeft.core.adapter import Site
from autopeft.sensitivity.allocation.greedy import DECIMALS, Priority, greedy_allocate
from autopeft.sensitivity.allocation.rank_budget import (
    RankBudget,
    Ranks,
    Spectra,
    check_number,
    checked_spectra,
)


def explained_variance(spectra: Spectra, budget: RankBudget, rho: float = 2.0) -> Ranks:
    """Keep the components that explain most of the variance of their site's inputs.

    The components of all sites are pooled, and as many as the budget pays for are kept, highest
    explained-variance ratio first. A site's rank is how many of its components are kept; it is capped at
    ⌈ρ·r⌉, with r = B / Σ cost_i the rank that all sites could have.

    EVA (Paischer et al., arXiv:2410.07170). Of equal ratios, the one at the lower rank is kept first.

    Args:
        spectra: The explained-variance ratios of each site, in any order. Components that are not given
            explain nothing: they are kept last.
        budget: What may be spent. A component's cost does not change its place in the order.
        rho: ρ, how far a site may go above the uniform rank, at least 1.

    Raises:
        ValueError: A number in a spectrum is negative or not finite, rho is below 1, a site
            has no cost, or the budget does not pay for the smallest ranks.
    """
    check_number("rho", rho, lambda value: value >= 1, "of at least 1")
    spectra = checked_spectra(spectra, budget)
    uniform_rank = budget.total / sum(budget.costs[site] for site in spectra)
    # Rounded up: rounded down, the caps could add up to less than the budget.
    cap = min(budget.largest, max(budget.smallest, math.ceil(round(rho * uniform_rank, DECIMALS))))
    return greedy_allocate(
        spectra, budget, lambda site, rank: (_component(spectra[site], rank), -rank), largest=cap
    )


def water_filling(spectra: Spectra, budget: RankBudget) -> Ranks:
    """Keep the components that gain most for what they cost: the knapsack over all sites' spectra.

    Maximises Σ_i Σ_{k ≤ r_i} σ_ik² subject to Σ cost_i·r_i ≤ B: how much of the squared norm of the
    gradients adapters of these ranks can follow (Eckart and Young, Psychometrika 1936). Ranks are granted
    by σ²/cost, highest first. Gains fall along a spectrum, so no component is ever worth taking before the
    one in front of it, and the order is a valid one.

    At equal costs this is exact: the best B/cost components are taken, and no other B/cost gain more. At
    unequal costs the problem is the knapsack problem, which is NP-hard. There the ranks are optimal for
    what is spent until the first rank that is wanted but cannot be paid, and from there on miss the
    optimum by less than the gain of that one component (Dantzig, Operations Research 1957).

    Args:
        spectra: The singular values σ of each site, in any order, as of the score "gradient_spectrum".
            Components that are not given gain nothing.
        budget: What may be spent.

    Raises:
        ValueError: A number in a spectrum is negative or not finite, a site has no cost, or
            the budget does not pay for the smallest ranks.
    """
    spectra = checked_spectra(spectra, budget)
    # Relative to the largest, squares do not overflow, and only what is negligible vanishes.
    unit = max(_component(spectrum, 0) for spectrum in spectra.values()) or 1.0

    def gain_for_cost(site: Site, rank: int) -> Priority:
        return (_component(spectra[site], rank) / unit) ** 2 / budget.costs[site], -rank

    return greedy_allocate(spectra, budget, gain_for_cost)


def _component(spectrum: Sequence[float], rank: int) -> float:
    return spectrum[rank] if rank < len(spectrum) else 0.0
