"""PerLayer: method × role × size for each block (or group of blocks), each block on or off."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline
from autopeft.search_spaces.learning_rates import suggest_learning_rate
from autopeft.search_spaces.method_choice import Encoding, Slot, placed
from autopeft.search_spaces.method_space import SlotSpace, checked_names
from autopeft.search_spaces.score_allocation import Allocation, site_values
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial
from autopeft.sensitivity import SCORES, SiteScores

# That a slot gets an adapter: a score is a prior, so the lowest is tried at times, the highest not always.
_LOWEST_PROBABILITY, _HIGHEST_PROBABILITY = 0.15, 0.85


@dataclass(frozen=True, kw_only=True)
class PerLayer(SlotSpace):
    """Every block, or group of blocks, chooses for each role a method and a size, or none.

    Further arguments, and the errors raised, are those of `MethodSpace`.

    Attributes:
        groups: Number of groups of consecutive blocks that share their choices; None for one group a
            block.
        encoding: How choices are laid before an Optuna sampler: "fixed" asks for every parameter every time,
            so that a trial also has the sizes of methods that it does not use, and of blocks that are off;
            "conditional" asks only for those that matter. The set of configurations is the same.
        prior: A score of `autopeft.sensitivity.SCORES` that says where drawn configurations put adapters: the
            baselines are joined by an allocation of the first method at three budgets, and draws are biased
            towards the best sites in place of even. None for no prior.
    """

    groups: int | None = None
    encoding: Encoding = "fixed"
    prior: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding not in get_args(Encoding):
            raise unknown_choice("encoding", str(self.encoding), get_args(Encoding))
        if self.groups is not None:
            check_whole("groups", self.groups, what="a number of groups of blocks", least=1)
        if self.prior is not None:
            checked_names("score as prior", self.prior, SCORES)
            if METHOD_SPECS[self._offered[0]].size_name is None:
                raise ValueError(
                    f"A prior allocates sizes, and the first method {self._offered[0]!r} has none."
                )

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """The score of the prior, if there is one."""
        return () if self.prior is None else (self.prior,)

    def block_groups(self, backbone: Backbone) -> tuple[tuple[int, ...], ...]:
        """Split the blocks into groups of consecutive ones, as even as can be."""
        if self.groups is None:
            return super().block_groups(backbone)
        total = len(backbone.blocks)
        if self.groups > total:
            raise ValueError(f"groups={self.groups}, but {backbone.name} has only {total} blocks.")
        edges = [round(index * total / self.groups) for index in range(self.groups + 1)]
        return tuple(tuple(range(*pair)) for pair in pairwise(edges))

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        """Ask for on/off a group, then for every slot; see `SearchSpace.suggest_adapters`."""
        adapters: dict[Site, Adapter] = {}
        for group, slots in self.groups_of_slots(backbone).items():
            on = trial.suggest_categorical(f"{group}.on", (True, False))
            for slot in slots if on or self.encoding == "fixed" else ():
                adapter = slot.suggest(trial, self.encoding)
                if on and adapter is not None:
                    adapters |= dict.fromkeys(slot.sites, adapter)
        return adapters

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return on/off a group, and every slot's parameters; see `SearchSpace.encode_adapters`."""
        parameters: dict[str, Any] = {}
        for group, slots in self.groups_of_slots(backbone).items():
            on = any(site in configuration.adapters for slot in slots for site in slot.sites)
            parameters[f"{group}.on"] = on
            for slot in slots:
                parameters |= slot.encode(configuration)
        return parameters

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Draw every parameter evenly, or adapters by the prior; see `SearchSpace.draw`."""
        if self.prior is None:
            return super().draw(generator, backbone)
        slots = self.slots(backbone)
        adapters = draw(slots, rank_percentiles(slots, self.scores_of(self.prior)), generator)
        rate = suggest_learning_rate(DrawnTrial(generator), self.learning_rate)
        return Configuration(adapters, learning_rate=rate)

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield the head alone, each method at its smallest everywhere, and the first at more sizes.

        These are in the top half and everywhere: memory follows the lowest adapted block. A prior adds its
        allocation of the first method, at half the budgets of its sizes everywhere.
        """
        methods = self.methods_on(backbone)
        first = self.choice_of(methods[0])
        groups = list(self.groups_of_slots(backbone).values())
        everywhere = self.slots(backbone)
        top = [slot for slots in groups[(len(groups) + 1) // 2 :] for slot in slots]
        yield Baseline(name="head alone", configuration=self.point())
        candidates = [(self.choice_of(method).smallest, "everywhere", everywhere) for method in methods]
        for adapter in first.three_adapters:
            candidates += [(adapter, "in the top half", top), (adapter, "everywhere", everywhere)]
        for adapter, where, slots in candidates:
            yield Baseline(name=f"{adapter} {where}", configuration=self.point(placed(adapter, slots)))
        for adapter in first.three_adapters if self.prior is not None else ():
            budget = max(1, self.cost_everywhere(adapter, backbone) // 2)
            allocation = Allocation(budget=budget, choice=first, roles=self.roles)
            allocated = allocation.adapters(backbone, self.scores_of(*self.scores_needed))
            yield Baseline(
                name=f"{self.prior} with {budget:,} parameters",
                configuration=self.point(_brought_to_slots(allocated, everywhere, adapter.method)),
            )

    def summary(self, backbone: Backbone) -> str:
        """Say what each role chooses from; see `SearchSpace.summary`."""
        groups = self.groups_of_slots(backbone)
        lines = [f"{len(groups)} groups of blocks ({', '.join(groups)}), each on or off; in each:"]
        for slot in list(groups.values())[-1]:
            lines.append(f"  {slot.sites[0].role}: off, {', '.join(map(str, slot.choices.values()))}")
        return "\n".join(lines)


def rank_percentiles(slots: Sequence[Slot], scores: SiteScores) -> dict[str, float]:
    """Return where each slot stands among all by its score a site: 0 for the lowest, 1 for the highest."""
    values = site_values(scores, [site for slot in slots for site in slot.sites])
    by_slot = {slot.name: sum(values[site] for site in slot.sites) / len(slot.sites) for slot in slots}
    ranking = sorted(by_slot, key=lambda name: (by_slot[name], name))
    return {name: place / max(1, len(ranking) - 1) for place, name in enumerate(ranking)}


def draw(
    slots: Iterable[Slot], standing: Mapping[str, float], generator: random.Random
) -> dict[Site, Adapter]:
    """Draw adapters, more often and larger where the score is higher.

    A slot gets an adapter with a probability from 0.15 to 0.85, by its standing; the method is drawn
    evenly, and the place of its size among the sizes is the better of two draws where the standing is
    above a draw, else the worse of two.
    """
    adapters: dict[Site, Adapter] = {}
    for slot in slots:
        share = standing[slot.name]
        if generator.random() >= _LOWEST_PROBABILITY + (_HIGHEST_PROBABILITY - _LOWEST_PROBABILITY) * share:
            continue
        sizes = generator.choice(list(slot.choices.values())).adapters
        places = [generator.randrange(len(sizes)) for _ in range(2)]
        place = max(places) if generator.random() < share else min(places)
        adapters |= dict.fromkeys(slot.sites, sizes[place])
    return adapters


def _brought_to_slots(
    sizes: Mapping[Site, Adapter], slots: Iterable[Slot], method: str
) -> dict[Site, Adapter]:
    """Bring an allocation into slots: the mean size over a slot's sites, as the nearest size it offers."""
    adapters: dict[Site, Adapter] = {}
    for slot in slots:
        given = [sizes[site].size or 0 for site in slot.sites if site in sizes]
        mean = sum(given) / len(slot.sites)
        if method not in slot.choices or mean < 0.5:
            continue
        nearest = min(slot.choices[method].adapters, key=lambda adapter: abs((adapter.size or 0) - mean))
        adapters |= dict.fromkeys(slot.sites, nearest)
    return adapters
