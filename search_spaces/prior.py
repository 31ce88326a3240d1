"""What earlier fronts say of a backbone: what to try first, which sites to trust, which learning rates.

Their sites are placed on this backbone by stack, relative depth of the block, and role.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline, SearchSpace
from autopeft.search_spaces.learning_rates import (
    fitting_learning_rate,
    learning_rate_bounds,
    readable_learning_rate,
    summed_learning_rate,
)
from autopeft.search_spaces.method_choice import MethodChoice

_LARGEST_WEIGHT = 2.0  # and the smallest is a half: scores on the task itself outweigh what another told
_FUSED = {"qkv": ("query", "key", "value"), "ffn_gate_up": ("ffn_up", "ffn_gate")}
_KIN: Mapping[str, tuple[str, ...]] = {
    **_FUSED,
    **{part: (whole,) for whole, parts in _FUSED.items() for part in parts},
}
"""The roles that stand for one where a model has one layer for several, or several for one."""


class Member(NamedTuple):
    """A point of an earlier front."""

    name: str  # as in "trial 12"
    configuration: Configuration
    worth: float  # what it adds to the front, relative to the others


@dataclass(frozen=True, kw_only=True)
class EarlierFront:
    """The front of a search on this backbone or another, or adapters that were exported from one.

    Without the head alone: there is nothing of it to place.
    """

    name: str
    depths: Mapping[str, int]  # number of blocks of each stack of its backbone
    members: Sequence[Member]
    tried: frozenset[Site]  # where some trial had an adapter
    hidden_size: int | None = None  # of its backbone; None in what earlier versions wrote
    steps: int | None = None  # of its whole trainings; None of adapters, too

    def rate_factor(self, hidden_size: int, steps: int) -> float:
        """Return by what its learning rates are multiplied for a model and a training; 1 where not known."""
        there = fitting_learning_rate(self.hidden_size or hidden_size, self.steps or steps)
        return fitting_learning_rate(hidden_size, steps) / there

    @property
    def relative_credits(self) -> dict[Site, float]:
        """The credit of each site that was tried, relative to their mean; see `site_credits`."""
        credits = site_credits((member.configuration, member.worth) for member in self.members)
        mean = sum(credits.values()) / len(self.tried)
        return {site: credits.get(site, 0.0) / mean for site in self.tried}

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, fit for JSON."""
        return {
            "name": self.name,
            "depths": dict(self.depths),
            "members": [[name, point.to_dict(), worth] for name, point, worth in self.members],
            "tried": [str(site) for site in sorted(self.tried)],
            "hidden_size": self.hidden_size,
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EarlierFront:
        """Read what `to_dict` gave."""
        members = [
            Member(name, Configuration.from_dict(point), worth) for name, point, worth in data["members"]
        ]
        tried = frozenset(map(Site.parse, data["tried"]))
        trained = {name: data.get(name) for name in ("hidden_size", "steps")}
        return cls(name=data["name"], depths=data["depths"], members=members, tried=tried, **trained)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Earlier fronts, placed on a backbone and in a space."""

    fronts: Sequence[EarlierFront] = ()
    baselines: Sequence[Baseline] = ()  # members as points of the space, those that add most first
    weights: Mapping[Site, float] = field(default_factory=dict)  # factors of scores, where anything is known
    rates: Mapping[str, float] = field(default_factory=dict)  # summed learning rate by method

    @classmethod
    def placed(
        cls, fronts: Sequence[EarlierFront], space: SearchSpace, backbone: Backbone, steps: int
    ) -> Prior:
        """Place fronts on a backbone, of which a whole training has so many steps.

        Raises:
            ValueError: None of their members can be placed.
        """
        found: dict[Configuration, Baseline] = {}
        members = [
            (front, member, factor)
            for front in fronts
            for factor in [front.rate_factor(backbone.hidden_size, steps)]
            for member in front.members
        ]
        for front, member, factor in sorted(members, key=lambda each: -each[1].worth):
            point = translated(member.configuration, front.depths, space, backbone, factor)
            if point is not None:
                name = f"{member.name} of {front.name}"
                if any(baseline.name == name for baseline in found.values()):  # of a search's namesake
                    name += f" ({len(found)})"
                found.setdefault(point, Baseline(name=name, configuration=point, is_trained_whole=False))
        if fronts and not found:
            raise ValueError(_nothing_placed(fronts, space, backbone))
        weights = _weights(fronts, backbone)
        rates = _rates((member, factor) for _, member, factor in members)
        baselines = tuple(found.values())
        return cls(fronts=tuple(fronts), baselines=baselines, weights=weights, rates=rates)

    def describe(self) -> str:
        """Say what there is to begin from."""
        names = ", ".join(front.name for front in self.fronts)
        kept = ", ".join(front.name for front in self.fronts if front.hidden_size is None)
        return (
            f"prior {names}: {len(self.baselines)} configurations, weights of {len(self.weights)} sites"
            + (f"; learning rates as they were, for a model of unknown width: {kept}" if kept else "")
        )


def site_credits(members: Iterable[tuple[Configuration, float]]) -> dict[Site, float]:
    """Return what each site has given: every configuration's worth, shared evenly by its sites."""
    credits: dict[Site, float] = defaultdict(float)
    for configuration, worth in members:
        for site in configuration.adapters:
            credits[site] += worth / len(configuration.adapters)
    return dict(credits)


def blocks_at(block: int, here: int, there: int) -> list[int]:
    """Return the blocks, of a stack of so many there, that stand at the depth of a block of one here.

    Each block of the longer stack stands at the block of the shorter one into which its middle falls. So
    every block has a counterpart, and a stack of the same length stands block at block.
    """
    if there <= here:
        return [(2 * block + 1) * there // (2 * here)]
    return [other for other in range(there) if (2 * other + 1) * here // (2 * there) == block]


def sites_at(site: Site, backbone: Backbone, depths: Mapping[str, int]) -> list[Site]:
    """Return the sites of another backbone that stand for one of this, its own role first."""
    if site.stack not in depths:
        return []
    blocks = blocks_at(site.block, backbone.depths[site.stack], depths[site.stack])
    roles = (site.role, *_KIN.get(site.role, ()))
    return [Site(block, role, site.stack) for role in roles for block in blocks]


def translated(
    configuration: Configuration,
    depths: Mapping[str, int],
    space: SearchSpace,
    backbone: Backbone,
    rate_factor: float = 1.0,
) -> Configuration | None:
    """Return the point of a space that stands for a configuration of another backbone; None where none does.

    Where several sites come together, what is largest there stands. The summed learning rate is multiplied by
    the factor, and kept within the bounds of the space.
    """
    adapters: dict[Site, list[Adapter]] = {}
    for site, choices in space.choices(backbone).items():
        there = (configuration.adapters.get(other, ()) for other in sites_at(site, backbone, depths))
        largest: tuple[Adapter, ...] = max(there, key=partial(_largest_place, choices), default=())
        adapters[site] = [
            choices[adapter.method].of_size(adapter.size or 1)
            for adapter in largest
            if adapter.method in choices
        ]
    point = space.nearest(Configuration(adapters, learning_rate=configuration.learning_rate), backbone)
    if not point.adapters:
        return None
    rate = rate_factor * summed_learning_rate(configuration) / len(point)
    return point.replace(
        learning_rate=readable_learning_rate(rate, *learning_rate_bounds(space.learning_rate))
    )


def _largest_place(choices: Mapping[str, MethodChoice], adapters: Iterable[Adapter]) -> float:
    """Return where in its family's range the largest adapter lies; 0 where none is offered."""
    return max((choices[each.method].place(each) for each in adapters if each.method in choices), default=0.0)


def _weights(fronts: Sequence[EarlierFront], backbone: Backbone) -> dict[Site, float]:
    """Return (1 + relative credit) / 2 within bounds, the mean over all that know of a site."""
    known = [(front.depths, front.relative_credits) for front in fronts]
    told = {
        site: [
            credits[other]
            for depths, credits in known
            for other in sites_at(site, backbone, depths)
            if other in credits
        ]
        for site in backbone.sites
    }
    return {site: min(_LARGEST_WEIGHT, (1 + fmean(values)) / 2) for site, values in told.items() if values}


def _rates(members: Iterable[tuple[Member, float]]) -> dict[str, float]:
    """Return by method the geometric mean of its members' summed learning rates, weighted by their worth.

    Each member comes with what its rates are multiplied by.
    """
    rates: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for member, factor in members:
        rate = math.log(factor * summed_learning_rate(member.configuration))
        for method in member.configuration.methods:
            rates[method].append((rate, member.worth))
    return {
        method: math.exp(fmean([rate for rate, _ in known], [worth for _, worth in known]))
        for method, known in rates.items()
    }


def _nothing_placed(fronts: Sequence[EarlierFront], space: SearchSpace, backbone: Backbone) -> str:
    points = [member.configuration for front in fronts for member in front.members]
    there = _listed((adapter.method, site) for point in points for site, adapter in point)
    choices = space.choices(backbone).items()
    here = _listed((method, site) for site, methods in choices for method in methods)
    names = ", ".join(front.name for front in fronts)
    return (
        f"Nothing of the prior ({names}) can be placed on {backbone.name}: it has {there}; the space offers "
        f"{here}. Leave the prior out, or let the space offer one of its methods and roles."
    )


def _listed(pairs: Iterable[tuple[str, Site]]) -> str:
    """Return methods with their roles, as in "lora on query, value"."""
    roles: dict[str, set[str]] = defaultdict(set)
    for method, site in pairs:
        roles[method].add(".".join(filter(None, (site.stack, site.role))))
    return "; ".join(f"{method} on {', '.join(sorted(names))}" for method, names in sorted(roles.items()))
