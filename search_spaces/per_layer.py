"""PerLayer: method × role × size for each block (or group of blocks), each block on or off."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.method_specs import METHOD_SPECS, ROLES
from autopeft.methods import count_parameters, count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import SearchSpace, checked_names, once_a_backbone, scores_of, size_ladder
from autopeft.search_spaces.baselines import Baseline, chosen_baselines
from autopeft.search_spaces.learning_rates import (
    LearningRate,
    checked_learning_rate,
    describe_learning_rate,
    encode_training,
    learning_rate_bounds,
    middle_learning_rate,
    suggest_learning_rate,
)
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.mutation import SiteMutator
from autopeft.search_spaces.score_allocation import Allocation, site_values
from autopeft.search_spaces.score_prior import allocated_to_slots, draw, rank_percentiles
from autopeft.search_spaces.site_groups import Encoding, Slot
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial
from autopeft.sensitivity import SCORES, SiteScores

_logger = logging.getLogger(__name__)
_DEFAULT_METHODS = ("lora", "series", "parallel", "prefix")
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
        methods: The methods to choose from; None for LoRA, series and parallel adapters and prefix tuning,
            without those that no site of the backbone can take.
        ranks: (smallest, largest) rank of LoRA; powers of two between them are searched.
        widths: (smallest, largest) bottleneck width of series and parallel adapters.
        prefix_lengths: (smallest, largest) prefix length.
        roles: Roles that may carry an adapter; None for all that a method can sit on.
        groups: Number of groups of consecutive blocks that share their choices; None for one group a
            block.
        learning_rate: A number, or (lowest, highest) to search it on a log scale.
        options: Options fixed for a method, as in `{"lora": {"alpha": 16}}`.
        encoding: How choices are laid before an Optuna sampler: "fixed" asks for every parameter every time,
            so that a trial also has the sizes of methods that it does not use, and of blocks that are off;
            "conditional" asks only for those that matter. The set of configurations is the same.
        prior: A score of `autopeft.sensitivity.SCORES` that says where drawn configurations put adapters: the
            baselines are joined by an allocation of the first method at three budgets, and draws are biased
            towards the best sites in place of even. None for no prior.
        site_scores: The prior's scores; a `Search` fills them in.

    Raises:
        ValueError: A method, role, option or bound is not valid.
    """

    methods: Sequence[str] | None = None
    ranks: tuple[int, int] = (1, 64)
    widths: tuple[int, int] = (1, 64)
    prefix_lengths: tuple[int, int] = (1, 32)
    roles: Sequence[str] | None = None
    groups: int | None = None
    learning_rate: LearningRate = (3e-4, 1e-2)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    encoding: Encoding = "fixed"
    prior: str | None = None
    site_scores: Mapping[str, SiteScores] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.methods is not None:
            object.__setattr__(self, "methods", checked_names("method", self.methods, METHOD_SPECS))
        object.__setattr__(self, "learning_rate", checked_learning_rate(self.learning_rate))
        if self.roles is not None:
            object.__setattr__(self, "roles", checked_names("role", self.roles, ROLES))
        for method in self.options:
            if method not in self._offered:
                raise unknown_choice("method in options", method, self._offered)
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
        for method in self._offered:
            _ = self.choice_of(method).adapters  # checks the options

    @property
    def _offered(self) -> Sequence[str]:
        return _DEFAULT_METHODS if self.methods is None else self.methods

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """The score of the prior, if there is one."""
        return () if self.prior is None else (self.prior,)

    def with_scores(self, scores: Mapping[str, SiteScores]) -> PerLayer:
        """Return the space with the scores of its prior."""
        return replace(self, site_scores={name: scores[name] for name in self.scores_needed})

    def choice_of(self, method: str) -> MethodChoice:
        """Return a method with the sizes and options it is searched with."""
        options = self.options.get(method, {})
        size_name = METHOD_SPECS[method].size_name
        if size_name is None:
            return MethodChoice(method=method, options=options)
        family = _FAMILY[size_name]
        return MethodChoice(method=method, sizes=size_ladder(getattr(self, family), family), options=options)

    def block_groups(self, backbone: Backbone) -> tuple[tuple[int, ...], ...]:
        """Split the blocks into groups of consecutive ones, as even as can be."""
        total = len(backbone.blocks)
        count = total if self.groups is None else self.groups
        if count > total:
            raise ValueError(f"groups={count}, but {backbone.name} has only {total} blocks.")
        edges = [round(index * total / count) for index in range(count + 1)]
        return tuple(tuple(range(*pair)) for pair in pairwise(edges))

    @once_a_backbone
    def groups_of_slots(self, backbone: Backbone) -> tuple[tuple[str, tuple[Slot, ...]], ...]:
        """Return every group's name with its slots."""
        return tuple(self._split(backbone))

    def slots(self, backbone: Backbone) -> list[Slot]:
        """Return the slots of all groups."""
        return [slot for _, slots in self.groups_of_slots(backbone) for slot in slots]

    def _split(self, backbone: Backbone) -> Iterator[tuple[str, tuple[Slot, ...]]]:
        choices = {method: self.choice_of(method) for method in self._offered}
        for blocks in self.block_groups(backbone):
            name = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
            slots = (self._slot(name, blocks, role, backbone, choices) for role in self._roles(backbone))
            yield name, tuple(slot for slot in slots if slot is not None)

    def _roles(self, backbone: Backbone) -> tuple[str, ...]:
        return backbone.roles if self.roles is None else tuple(self.roles)

    @staticmethod
    def _slot(
        group: str, blocks: Sequence[int], role: str, backbone: Backbone, choices: Mapping[str, MethodChoice]
    ) -> Slot | None:
        sites = tuple(Site(block, role) for block in blocks if Site(block, role) in backbone.sites)
        possible = {
            method: choice
            for method, choice in choices.items()
            if sites and all(not backbone.obstacle(backbone.sites[site], method) for site in sites)
        }
        return Slot(group=group, sites=sites, choices=possible) if possible else None

    def methods_on(self, backbone: Backbone) -> tuple[str, ...]:
        """Return the methods that some site of a backbone can take."""
        used = {method for slot in self.slots(backbone) for method in slot.choices}
        return tuple(method for method in self._offered if method in used)

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a named method that no role can take.

        A method of the default list that no role can take is left out, and the log says so.
        """
        for role in self.roles or ():
            if role not in backbone.roles:
                raise unknown_choice(f"role in {backbone.name}", role, backbone.roles)
        possible = self.methods_on(backbone)
        for method in self._offered:
            if method in possible:
                continue
            obstacle = f"{method!r} can sit on none of the roles {', '.join(self._roles(backbone))} of "
            if self.methods is not None or not possible:
                raise ValueError(
                    f"{obstacle}{backbone.name}: leave it out of methods, or add a role that takes it."
                )
            _logger.warning("%s%s: it is left out of the search.", obstacle, backbone.name)

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask for on/off a group, then for every slot; see `SearchSpace.suggest`."""
        adapters: dict[Site, Adapter] = {}
        for group, slots in self.groups_of_slots(backbone):
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
        for group, slots in self.groups_of_slots(backbone):
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
        return parameters | encode_training(configuration, self.learning_rate)

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Draw every parameter evenly, or adapters by the prior; see `SearchSpace.draw`."""
        if self.prior is None:
            return super().draw(generator, backbone)
        slots = self.slots(backbone)
        adapters = draw(slots, rank_percentiles(slots, scores_of(self.site_scores, self.prior)), generator)
        rate = suggest_learning_rate(DrawnTrial(generator), self.learning_rate)
        return Configuration(adapters, learning_rate=rate)

    @once_a_backbone
    def choices(self, backbone: Backbone) -> dict[Site, Mapping[str, MethodChoice]]:
        """Return the methods of every slot, by its first site; see `SearchSpace.choices`."""
        return dict(sorted((slot.sites[0], slot.choices) for slot in self.slots(backbone)))

    def mutator(self, backbone: Backbone) -> SiteMutator:
        """Return moves by slot, role or block; see `SearchSpace.mutator`."""
        slots = self.slots(backbone)
        sites = [slot.sites[0] for slot in slots]
        scores = None if self.prior is None else scores_of(self.site_scores, self.prior)
        return SiteMutator(
            learning_rate=learning_rate_bounds(self.learning_rate),
            choices=self.choices(backbone),
            values=dict.fromkeys(sites, 1.0) if scores is None else site_values(scores, sites),
            tied={slot.sites[0]: slot.sites for slot in slots},
        )

    def baselines(self, backbone: Backbone, trials: int | None = None) -> tuple[Baseline, ...]:
        """Return the head alone, each method at its smallest everywhere, and the first at more sizes.

        These are in the top half and everywhere: memory follows the lowest adapted block.
        """
        methods = self.methods_on(backbone)
        first = self.choice_of(methods[0]).adapters
        groups = [slots for _, slots in self.groups_of_slots(backbone)]
        everywhere = [slot for slots in groups for slot in slots]
        top = [slot for slots in groups[(len(groups) + 1) // 2 :] for slot in slots]
        smallest = [self.choice_of(method).smallest for method in methods]
        placed = [(adapter, "everywhere", everywhere) for adapter in smallest]
        for adapter in dict.fromkeys((first[0], first[len(first) // 2], first[-1])):
            placed += [(adapter, "in the top half", top), (adapter, "everywhere", everywhere)]
        found = [Baseline(name="head alone", configuration=self._configuration(()))]
        for adapter, where, slots in placed:
            taking = [slot for slot in slots if adapter.method in slot.choices]
            pairs = [(site, adapter) for slot in taking for site in slot.sites]
            found.append(Baseline(name=f"{adapter} {where}", configuration=self._configuration(pairs)))
        prior = () if self.prior is None else self._prior_baselines(backbone, self.prior, methods[0])
        return chosen_baselines([*found, *prior], trials)

    def _prior_baselines(self, backbone: Backbone, prior: str, method: str) -> Iterator[Baseline]:
        """Yield the prior's allocation of a method, at half the budgets of its sizes everywhere."""
        slots, sizes = self.slots(backbone), self.choice_of(method).adapters
        candidates = [site for slot in slots if method in slot.choices for site in slot.sites]
        for adapter in dict.fromkeys((sizes[0], sizes[len(sizes) // 2], sizes[-1])):
            allocation = Allocation(
                budget=max(1, sum(count_site(backbone, site, adapter) for site in candidates) // 2),
                method=method,
                largest=sizes[-1].size or 1,
                roles=self.roles,
                options=dict(self.options.get(method, {})),
            )
            adapters = allocation.adapters(backbone, scores_of(self.site_scores, prior))
            pairs = allocated_to_slots(slots, method, adapters)
            name = f"{prior} with {allocation.budget:,} parameters"
            yield Baseline(name=name, configuration=self._configuration(list(pairs.items())))

    def _configuration(self, pairs: Sequence[tuple[Site, Adapter]]) -> Configuration:
        return Configuration(dict(pairs), learning_rate=middle_learning_rate(self.learning_rate))

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and every slot at its largest."""
        pairs = [(site, slot.largest(backbone)) for slot in self.slots(backbone) for site in slot.sites]
        return self._configuration(()), self._configuration(pairs)

    def count(self, backbone: Backbone) -> int:
        """Return the product over all slots of their choices."""
        return math.prod(slot.count for slot in self.slots(backbone))

    def describe(self, backbone: Backbone) -> str:
        """Say what each role chooses from; see `SearchSpace.describe`."""
        groups = self.groups_of_slots(backbone)
        names = ", ".join(name for name, _ in groups)
        lines = [f"PerLayer: {len(groups)} groups of blocks ({names}), each on or off; in each:"]
        for slot in groups[-1][1]:
            choices = [_described(choice) for choice in slot.choices.values()]
            lines.append(f"  {slot.sites[0].role}: off, {', '.join(choices)}")
        low, high = (count_parameters(backbone, end) for end in self.extremes(backbone))
        lines += [
            f"learning rate {describe_learning_rate(self.learning_rate)}",
            f"{self.count(backbone):.3g} configurations, {low:,} to {high:,} trainable parameters",
        ]
        return "\n".join(lines)


def _described(choice: MethodChoice) -> str:
    return f"{choice.method} {'|'.join(map(str, choice.sizes))}" if choice.sizes else choice.method
