"""PerLayer: method × role × size for each block (or group of blocks), each block on or off."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.method_specs import METHOD_SPECS, ROLES
from autopeft.methods import count_parameters, count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import (
    Baseline,
    History,
    LearningRate,
    SearchSpace,
    SuggestTrial,
    checked_learning_rate,
    checked_names,
    describe_learning_rate,
    distinct,
    draw_learning_rate,
    encode_learning_rate,
    middle_learning_rate,
    options_of,
    scores_of,
    size_ladder,
    suggest_learning_rate,
)
from autopeft.search_spaces.score_allocation import Allocation
from autopeft.search_spaces.score_prior import allocated_to_slots, draw, rank_percentiles
from autopeft.search_spaces.site_groups import Encoding, Slot
from autopeft.sensitivity import SCORES, SiteScores

SizeFamily = Literal["ranks", "widths", "prefix_lengths"]
_FAMILY: Mapping[str, SizeFamily] = {
    "rank": "ranks",
    "bottleneck width": "widths",
    "prefix length": "prefix_lengths",
}


@dataclass(frozen=True, kw_only=True)
class PerLayer(SearchSpace):
    """Every block, or group of blocks, chooses for each role a method and a size, or none.

    Attributes:
        methods: The methods to choose from.
        ranks: (smallest, largest) rank of LoRA; powers of two between them are searched.
        widths: (smallest, largest) bottleneck width of series and parallel adapters.
        prefix_lengths: (smallest, largest) prefix length.
        roles: Roles that may carry an adapter; None for all that a method can sit on.
        groups: Number of groups of consecutive blocks that share their choices; None for one group a
            block.
        learning_rate: A number, or (lowest, highest) to search it on a log scale.
        options: Options fixed for a method, as in `{"lora": {"alpha": 16}}`.
        encoding: How choices are laid before the sampler: "fixed" asks for every parameter every time,
            "conditional" only for those that matter. The set of configurations is the same.
        prior: A score of `autopeft.sensitivity.SCORES` that says where the first trials put adapters: an
            allocation of the first method at three budgets, then draws biased towards the best sites in
            place of even ones, until the sampler has seen `prior_trials` trials. None for no prior.
        prior_trials: Trials that the prior decides, baselines included.
        site_scores: The prior's scores; a `Search` fills them in.

    Raises:
        ValueError: A method, role, option or bound is not valid.
    """

    methods: Sequence[str] = ("lora", "series", "parallel", "prefix")
    ranks: tuple[int, int] = (1, 64)
    widths: tuple[int, int] = (1, 64)
    prefix_lengths: tuple[int, int] = (1, 32)
    roles: Sequence[str] | None = None
    groups: int | None = None
    learning_rate: LearningRate = (3e-4, 1e-2)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    encoding: Encoding = "fixed"
    prior: str | None = None
    prior_trials: int = 20
    site_scores: Mapping[str, SiteScores] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", checked_names("method", self.methods, METHOD_SPECS))
        object.__setattr__(self, "learning_rate", checked_learning_rate(self.learning_rate))
        if self.roles is not None:
            object.__setattr__(self, "roles", checked_names("role", self.roles, ROLES))
        for method in self.options:
            if method not in self.methods:
                raise unknown_choice("method in options", method, self.methods)
        if self.encoding not in get_args(Encoding):
            raise unknown_choice("encoding", str(self.encoding), get_args(Encoding))
        if self.groups is not None:
            check_whole("groups", self.groups, what="a number of groups of blocks", least=1)
        if self.prior is not None:
            checked_names("score as prior", self.prior, SCORES)
            if METHOD_SPECS[self.methods[0]].size_name is None:
                raise ValueError(
                    f"A prior allocates sizes, and the first method {self.methods[0]!r} has none."
                )
        for method in self.methods:
            self.adapters_of(method)

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """The score of the prior, if there is one."""
        return () if self.prior is None else (self.prior,)

    def with_scores(self, scores: Mapping[str, SiteScores]) -> PerLayer:
        """Return the space with the scores of its prior."""
        return replace(self, site_scores={name: scores[name] for name in self.scores_needed})

    def adapters_of(self, method: str) -> tuple[Adapter, ...]:
        """Return the adapters a method is searched with, sizes rising."""
        options = options_of(self.options, method)
        size_name = METHOD_SPECS[method].size_name
        if size_name is None:
            return (Adapter(method, None, options),)
        family = _FAMILY[size_name]
        return tuple(Adapter(method, size, options) for size in size_ladder(getattr(self, family), family))

    def block_groups(self, backbone: Backbone) -> tuple[tuple[int, ...], ...]:
        """Split the blocks into groups of consecutive ones, as even as can be."""
        total = len(backbone.blocks)
        count = total if self.groups is None else self.groups
        if count > total:
            raise ValueError(f"groups={count}, but {backbone.name} has only {total} blocks.")
        edges = [round(index * total / count) for index in range(count + 1)]
        return tuple(tuple(range(*pair)) for pair in pairwise(edges))

    def slots(self, backbone: Backbone) -> tuple[tuple[str, tuple[Slot, ...]], ...]:
        """Return every group's name with its slots."""
        known = self._slots_of.get(backbone)
        if known is None:
            known = self._slots_of[backbone] = tuple(self._split(backbone))
        return known

    @cached_property
    def _slots_of(self) -> WeakKeyDictionary[Backbone, tuple[tuple[str, tuple[Slot, ...]], ...]]:
        return WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the slots, which hang on a backbone of this process."""
        return {name: one for name, one in vars(self).items() if name != "_slots_of"}

    def _split(self, backbone: Backbone) -> Iterator[tuple[str, tuple[Slot, ...]]]:
        adapters = {method: self.adapters_of(method) for method in self.methods}
        for blocks in self.block_groups(backbone):
            name = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
            slots = (self._slot(name, blocks, role, backbone, adapters) for role in self._roles(backbone))
            yield name, tuple(slot for slot in slots if slot is not None)

    def _roles(self, backbone: Backbone) -> tuple[str, ...]:
        return backbone.roles if self.roles is None else tuple(self.roles)

    def _slot(
        self,
        group: str,
        blocks: Sequence[int],
        role: str,
        backbone: Backbone,
        adapters: Mapping[str, tuple[Adapter, ...]],
    ) -> Slot | None:
        sites = tuple(Site(block, role) for block in blocks if Site(block, role) in backbone.sites)
        methods = {
            method: several
            for method, several in adapters.items()
            if sites and all(not backbone.obstacle(backbone.sites[s], method) for s in sites)
        }
        return Slot(group=group, sites=sites, adapters=methods) if methods else None

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a method no role can take."""
        for role in self.roles or ():
            if role not in backbone.roles:
                raise unknown_choice(f"role in {backbone.name}", role, backbone.roles)
        used = {method for _, slots in self.slots(backbone) for s in slots for method in s.adapters}
        for method in self.methods:
            if method not in used:
                roles = ", ".join(self._roles(backbone))
                raise ValueError(
                    f"{method!r} can sit on none of the roles {roles} of {backbone.name}: "
                    "leave it out of methods, or add a role that takes it."
                )

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask for on/off a group, then for every slot; see `SearchSpace.suggest`."""
        adapters: dict[Site, Adapter] = {}
        for group, slots in self.slots(backbone):
            on = trial.suggest_categorical(f"{group}.on", (True, False))
            if not on and self.encoding == "conditional":
                continue
            for slot in slots:
                adapter = slot.suggest(trial, self.encoding)
                if on and adapter is not None:
                    adapters |= dict.fromkeys(slot.sites, adapter)
        rate = suggest_learning_rate(trial, self.learning_rate)
        return Configuration(adapters, learning_rate=rate)

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of a configuration; see `SearchSpace.encode`."""
        parameters: dict[str, Any] = {}
        covered: set[Site] = set()
        for group, slots in self.slots(backbone):
            chosen = [(slot, slot.of(configuration)) for slot in slots]
            covered |= {site for slot in slots for site in slot.sites}
            on = any(adapter is not None for _, adapter in chosen)
            parameters[f"{group}.on"] = on
            if on or self.encoding == "fixed":
                for slot, adapter in chosen:
                    parameters |= slot.encode(adapter, self.encoding)
        outside = set(configuration.adapters) - covered
        if outside:
            raise ValueError(f"{min(outside)} is no site of this space.")
        return parameters | encode_learning_rate(configuration.learning_rate, self.learning_rate)

    def baselines(self, backbone: Backbone) -> tuple[Baseline, ...]:
        """Return the head alone, and the first method at three sizes: everywhere and in the top half.

        Memory follows the lowest adapted block, so the top half is the other end of that trade.
        """
        method = self.methods[0]
        sizes = self.adapters_of(method)
        groups = [slots for _, slots in self.slots(backbone)]
        top = groups[(len(groups) + 1) // 2 :]
        found = [Baseline(name="head alone", configuration=self._configuration(()))]
        for adapter in dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])):
            for where, chosen in (("everywhere", groups), ("in the top half", top)):
                slots = [slot for several in chosen for slot in several if method in slot.adapters]
                pairs = [(site, adapter) for slot in slots for site in slot.sites]
                found.append(Baseline(name=f"{adapter} {where}", configuration=self._configuration(pairs)))
        found += self._prior_anchors(backbone, sizes)
        return distinct(found)

    def _prior_anchors(self, backbone: Backbone, sizes: Sequence[Adapter]) -> Iterator[Baseline]:
        """Yield the prior's allocation of the first method, at the budgets of its sizes everywhere."""
        if self.prior is None:
            return
        slots = [slot for _, several in self.slots(backbone) for slot in several]
        candidates = [site for slot in slots if self.methods[0] in slot.adapters for site in slot.sites]
        for adapter in dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])):
            allocation = Allocation(
                budget=max(1, sum(count_site(backbone, site, adapter) for site in candidates) // 2),
                method=self.methods[0],
                largest=sizes[-1].size or 1,
                roles=self.roles,
                options=dict(options_of(self.options, self.methods[0])),
            )
            adapters = allocation.adapters(backbone, scores_of(self.site_scores, self.prior))
            pairs = allocated_to_slots(slots, self.methods[0], adapters)
            name = f"{self.prior} with {allocation.budget:,} parameters"
            yield Baseline(name=name, configuration=self._configuration(list(pairs.items())))

    def proposes(self, number: int) -> bool:
        """Whether the prior decides the trial."""
        return self.prior is not None and number < self.prior_trials

    def propose(
        self,
        number: int,
        front: Mapping[Configuration, float],
        generator: random.Random,
        backbone: Backbone,
        history: History,
    ) -> dict[str, Any] | None:
        """Draw by the prior until `prior_trials`; see `SearchSpace.propose`."""
        if self.prior is None or not self.proposes(number):
            return None
        slots = [slot for _, several in self.slots(backbone) for slot in several]
        adapters = draw(slots, rank_percentiles(slots, scores_of(self.site_scores, self.prior)), generator)
        rate = draw_learning_rate(generator, self.learning_rate)
        return self.encode(Configuration(adapters, learning_rate=rate), backbone)

    def _configuration(self, pairs: Sequence[tuple[Site, Adapter]]) -> Configuration:
        return Configuration(dict(pairs), learning_rate=middle_learning_rate(self.learning_rate))

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and every slot at its largest."""
        pairs = [
            (site, slot.largest(backbone))
            for _, slots in self.slots(backbone)
            for slot in slots
            for site in slot.sites
        ]
        return self._configuration(()), self._configuration(pairs)

    def count(self, backbone: Backbone) -> int:
        """Return the product over all slots of their choices."""
        return math.prod(slot.count for _, slots in self.slots(backbone) for slot in slots)

    def describe(self, backbone: Backbone) -> str:
        """Say what each role chooses from; see `SearchSpace.describe`."""
        groups = list(self.slots(backbone))
        names = ", ".join(name for name, _ in groups)
        lines = [f"PerLayer: {len(groups)} groups of blocks ({names}), each on or off; in each:"]
        for slot in groups[-1][1]:
            choices = [_choices(method, several) for method, several in slot.adapters.items()]
            lines.append(f"  {slot.sites[0].role}: off, {', '.join(choices)}")
        low, high = (count_parameters(backbone, one) for one in self.extremes(backbone))
        lines += [
            f"learning rate {describe_learning_rate(self.learning_rate)}",
            f"{self.count(backbone):.3g} configurations, {low:,} to {high:,} trainable parameters",
        ]
        return "\n".join(lines)


def _choices(method: str, several: Sequence[Adapter]) -> str:
    if several[0].size is None:
        return method
    return f"{method} {'|'.join(str(adapter.size) for adapter in several)}"
