"""The allocators there are, by name, and what all of them check."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from autopeft.core.adapter import Site
from autopeft.core.errors import check_choice
from autopeft.sensitivity.allocation.rank_budget import RankBudget, Ranks

Evidence = Literal["scores", "spectra"]


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """A rule by its name, for a search space or a YAML file."""

    # The function that allocates. Its evidence is checked, in the order of the sites.
    rule: Callable[..., Ranks]
    # What it reads: "scores" (one number a site) or "spectra" (what each further rank at a site adds); all of
    # at least 0.
    evidence: Evidence

    @property
    def name(self) -> str:
        """The name it goes by."""
        return self.rule.__name__

    @property
    def options(self) -> Mapping[str, float]:
        """Every option with its default."""
        parameters = list(inspect.signature(self.rule).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}

    def __call__(self, evidence: Mapping[Site, Any], budget: RankBudget, **options: float) -> Ranks:
        """Return the rank of each site.

        Args:
            evidence: A number for each site, or for "spectra" several, in any order.
            budget: What may be spent.
            **options: Options of the rule.
        """
        check_choice(f"option of the allocator {self.name!r}", self.options, *options)
        if not evidence:
            raise ValueError("No sites to give ranks to: expected at least one.")
        for site in sorted(evidence):
            if site not in budget.costs:
                raise ValueError(f"{site} has no cost: the costs of a budget must name every site there is.")
        floor = budget.smallest * sum(budget.costs[site] for site in evidence)
        if budget.total < floor:
            raise ValueError(
                f"A budget of {budget.total} does not pay for rank {budget.smallest} at all {len(evidence)} "
                f"sites, which costs {floor}: raise the total or lower the smallest rank."
            )
        return self.rule(
            {site: self._read(site, evidence[site]) for site in sorted(evidence)}, budget, **options
        )

    def _read(self, site: Site, given: float | Iterable[float]) -> float | tuple[float, ...]:
        numbers = tuple(map(float, given if isinstance(given, Iterable) else (given,)))
        for number in numbers:
            if not math.isfinite(number) or number < 0:
                raise ValueError(
                    f"The {self.evidence} of {site} contain {number}: expected finite numbers of at least 0."
                )
        return tuple(sorted(numbers, reverse=True)) if self.evidence == "spectra" else numbers[0]


ALLOCATORS: dict[str, Allocator] = {}
"""Every allocator, by name; the rules of `rules.py` in their order there."""


def allocator(evidence: Evidence) -> Callable[[Callable[..., Ranks]], Allocator]:
    """Return the decorator that makes an allocator of a rule and registers it; see `Allocator`."""

    def register(rule: Callable[..., Ranks]) -> Allocator:
        return ALLOCATORS.setdefault(rule.__name__, Allocator(rule=rule, evidence=evidence))

    return register
