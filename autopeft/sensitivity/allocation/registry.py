"""The allocators there are, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from autopeft.core.adapter import Site
from autopeft.core.errors import unknown_choice
from autopeft.sensitivity.allocation.rank_budget import RankBudget, Ranks
from autopeft.sensitivity.allocation.score_rules import fisher, gora, proportional, top_k
from autopeft.sensitivity.allocation.spectrum_rules import explained_variance, water_filling
from autopeft.sensitivity.allocation.spt import structured

Evidence = Literal["scores", "spectra", "counts"]


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """A rule by its name, for a search space or a YAML file.

    Attributes:
        rule: The function that allocates.
        evidence: What it reads: "scores" (one number a site), "spectra" (several numbers a site, in
            descending order) or
            "counts" (of sensitive weights, one number a site).
    """

    rule: Callable[..., Ranks]
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

        Raises:
            ValueError: An option is unknown, or the rule raises it.
        """
        for name in options:
            if name not in self.options:
                raise unknown_choice(f"option of the allocator {self.name!r}", name, self.options)
        return self.rule(evidence, budget, **options)


ALLOCATORS: Mapping[str, Allocator] = MappingProxyType(
    {
        each.name: each
        for each in (
            Allocator(rule=proportional, evidence="scores"),
            Allocator(rule=gora, evidence="scores"),
            Allocator(rule=fisher, evidence="scores"),
            Allocator(rule=top_k, evidence="scores"),
            Allocator(rule=structured, evidence="counts"),
            Allocator(rule=explained_variance, evidence="spectra"),
            Allocator(rule=water_filling, evidence="spectra"),
        )
    }
)
"""Every allocator, by name."""


def find_allocator(name: str) -> Allocator:
    """Return an allocator by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in ALLOCATORS:
        raise unknown_choice("allocator", name, ALLOCATORS)
    return ALLOCATORS[name]
