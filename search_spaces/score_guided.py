"""ScoreGuided: a few numbers say how a score's best sites share a budget; near them lies every placement."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.core.errors import unknown_choice
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import count_parameters, count_site
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import (
    SearchSpace,
    check_range,
    checked_names,
    describe_range,
    once_a_backbone,
    scores_of,
)
from autopeft.search_spaces.baselines import Baseline, chosen_baselines
from autopeft.search_spaces.learning_rates import (
    LearningRate,
    checked_learning_rate,
    describe_learning_rate,
    encode_training,
    learning_rate_at,
    learning_rate_bounds,
    middle_learning_rate,
    suggest_learning_rate,
)
from autopeft.search_spaces.method_choice import MethodChoice
from autopeft.search_spaces.mutation import SiteMutator
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.score_allocation import (
    SCORE_ALLOCATORS,
    SCORES_WITH_SPECTRA,
    Allocation,
    site_values,
)
from autopeft.search_spaces.site_encoding import encode_sites, suggest_sites
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial
from autopeft.sensitivity import SCORES, SiteScores
from autopeft.sensitivity.allocation import find_allocator

_GUIDED, _PLACED = "guided", "placed"
_TEMPERATURE = "temperature"
_FEWEST_SITES_SHARE = 8  # the smallest budget pays for the smallest adapter at an eighth of the sites


class _Anchor(NamedTuple):
    """A baseline: the places of budget and rate on their log scales, the share of blocks without adapters."""

    budget: float
    lowest_block: float
    rate: float
    is_trained_whole: bool


# Small ones: large ones are tried when a model promises something of them. Two have one budget: where rates
# and sizes go together, a model takes one for the other. The higher rate, which may come to nothing, goes on
# after a rung only if it is promising; three whole trainings (the head alone is the third) say what is gained
# after a rung.
_ANCHORS = (
    _Anchor(budget=0.1, lowest_block=0.83, rate=1.0, is_trained_whole=True),
    _Anchor(budget=0.35, lowest_block=0.67, rate=0.6, is_trained_whole=True),
    _Anchor(budget=0.35, lowest_block=0.67, rate=0.8, is_trained_whole=False),
)


@dataclass(frozen=True, kw_only=True)
class ScoreGuided(SearchSpace):
    """A score ranks the sites; budget, temperature and placement turn it into the size of every adapter.

    Six or seven dimensions whatever the number of blocks: budget, temperature, placement, lowest block,
    learning rate, and score and method where there are several. These are the guided configurations, which
    `draw` gives. The space has every other placement of its methods and sizes too, so that a sampler can
    change single sites, roles or blocks of what proved good (resize, drop, add, cross over).

    Attributes:
        scores: Scores to choose from, of `autopeft.sensitivity.SCORES`. The search computes them once.
        methods: Methods with a size to choose from: lora, series, parallel, prefix. A guided configuration
            has one of them, another may mix them.
        ranks: (smallest, largest) rank of LoRA.
        widths: (smallest, largest) bottleneck width of series and parallel adapters.
        prefix_lengths: (smallest, largest) prefix length.
        roles: Roles that may carry an adapter; None for all that a method can sit on.
        allocator: How the sites share a budget, of `autopeft.sensitivity.allocation.ALLOCATORS`:
            "proportional", "gora", "fisher" or "top_k"; or "explained_variance" or "water_filling", which
            read the spectra that the scores "gradient_spectrum" and "explained_variance" have.
        temperature: (lowest, highest) power of the scores, of the allocator "proportional": 0 is the same
            size everywhere.
        placement: (smallest, largest) share of the sites that may carry an adapter.
        learning_rate: A number, or (lowest, highest) to search it on a log scale.
        options: Options fixed for a method, as in `{"lora": {"alpha": 16}}`.
        site_scores: The scores of the backbone on the task; a `Search` fills them in.

    Raises:
        ValueError: A score, method, role, allocator, option or bound is not valid.
    """

    scores: Sequence[str] = ("gradient_norm", "gora", "explained_variance")
    methods: Sequence[str] = ("lora",)
    ranks: tuple[int, int] = (1, 64)
    widths: tuple[int, int] = (1, 64)
    prefix_lengths: tuple[int, int] = (1, 32)
    roles: Sequence[str] | None = None
    allocator: str = "proportional"
    temperature: tuple[float, float] = (0.0, 1.5)
    placement: tuple[float, float] = (0.2, 1.0)
    learning_rate: LearningRate = (3e-4, 1e-2)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    site_scores: Mapping[str, SiteScores] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", checked_names("score", self.scores, SCORES))
        sized = [name for name, method in METHOD_SPECS.items() if method.size_name is not None]
        object.__setattr__(self, "methods", checked_names("method with a size", self.methods, sized))
        object.__setattr__(self, "learning_rate", checked_learning_rate(self.learning_rate))
        _ = self._per_layer  # checks its settings
        check_range("temperature", self.temperature, 0.0, math.inf)
        check_range("placement", self.placement, 0.0, 1.0)
        if self.placement[0] <= 0:
            raise ValueError(f"placement is a share of the sites above 0, got {self.placement!r}.")
        if self.allocator not in SCORE_ALLOCATORS:
            raise unknown_choice("allocator of scores", self.allocator, SCORE_ALLOCATORS)
        if find_allocator(self.allocator).evidence == "spectra":
            for score in self.scores:
                if score not in SCORES_WITH_SPECTRA:
                    raise unknown_choice(
                        f"score with spectra, which the allocator {self.allocator!r} reads,",
                        score,
                        SCORES_WITH_SPECTRA,
                    )

    @cached_property
    def _per_layer(self) -> PerLayer:
        """The per-layer space with the same methods, whose sizes end where these do."""
        return PerLayer(
            methods=self.methods,
            ranks=self.ranks,
            widths=self.widths,
            prefix_lengths=self.prefix_lengths,
            roles=self.roles,
            learning_rate=self.learning_rate,
            options=self.options,
        )

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """The scores a search has to compute first."""
        return tuple(self.scores)

    def with_scores(self, scores: Mapping[str, SiteScores]) -> ScoreGuided:
        """Return the space with the scores of a backbone on a task."""
        missing = [name for name in self.scores if name not in scores]
        if missing:
            raise unknown_choice("score among those computed", missing[0], scores)
        return replace(self, site_scores={name: scores[name] for name in self.scores})

    @once_a_backbone
    def choices(self, backbone: Backbone) -> dict[Site, dict[str, MethodChoice]]:
        """Return the methods that each site takes, in all sizes; see `SearchSpace.choices`."""
        every = {method: self._choice_of(method) for method in self.methods}
        slots = self._per_layer.choices(backbone)
        return {site: {method: every[method] for method in methods} for site, methods in slots.items()}

    def _choice_of(self, method: str) -> MethodChoice:
        ladder = self._per_layer.choice_of(method)
        return replace(ladder, sizes=range(ladder.sizes[0], ladder.sizes[-1] + 1))

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a method no role can take."""
        self._per_layer.validate(backbone)

    @once_a_backbone
    def budgets(self, backbone: Backbone) -> tuple[int, int]:
        """Return the smallest and the largest budget.

        The smallest pays for the smallest adapter at an eighth of the sites: below it almost nothing is
        left to place. The largest pays for the largest adapter everywhere.
        """
        smallest = dict.fromkeys(self.methods, 0)
        largest = dict.fromkeys(self.methods, 0)
        for site, methods in self.choices(backbone).items():
            for method, choice in methods.items():
                smallest[method] += count_site(backbone, site, choice.smallest)
                largest[method] += count_site(backbone, site, choice.largest)
        return max(1, min(smallest.values()) // _FEWEST_SITES_SHARE), max(largest.values())

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask for the few numbers, or for every site; see `SearchSpace.suggest`."""
        if trial.suggest_categorical("stage", (_GUIDED, _PLACED)) == _GUIDED:
            adapters = self._suggest_guided(trial, backbone)
        else:
            adapters = suggest_sites(trial, self.choices(backbone))
        rate = suggest_learning_rate(trial, self.learning_rate)
        return Configuration(adapters, learning_rate=rate)

    def _suggest_guided(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        low, high = self.budgets(backbone)
        return self._allocated(
            backbone,
            trial.suggest_categorical("score", tuple(self.scores)),
            method=trial.suggest_categorical("method", tuple(self.methods)),
            budget=trial.suggest_int("budget", low, high, log=True),
            temperature=trial.suggest_float(_TEMPERATURE, *self.temperature) if self._is_heated else 0.0,
            placement=trial.suggest_float("placement", *self.placement),
            lowest_block=trial.suggest_int("lowest_block", 0, self._highest_block(backbone)),
        )

    @property
    def _is_heated(self) -> bool:
        return _TEMPERATURE in find_allocator(self.allocator).options

    @once_a_backbone
    def _highest_block(self, backbone: Backbone) -> int:
        """Return the highest block in which every method finds a site."""
        choices = self.choices(backbone)
        return min(
            max(site.block for site, methods in choices.items() if name in methods) for name in self.methods
        )

    def _allocated(
        self, backbone: Backbone, score: str, *, method: str, temperature: float, **allocation: Any
    ) -> dict[Site, Adapter]:
        sizes, options = self._choice_of(method).sizes, dict(self.options.get(method, {}))
        adapters = Allocation(
            method=method,
            allocator=self.allocator,
            largest=sizes[-1],
            roles=self.roles,
            allocator_options={_TEMPERATURE: temperature} if self._is_heated else {},
            options=options,
            **allocation,
        ).adapters(backbone, scores_of(self.site_scores, score))
        return {site: adapter for site, adapter in adapters.items() if (adapter.size or 0) >= sizes[0]}

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of a configuration, site by site; see `SearchSpace.encode`."""
        sites = encode_sites(configuration, self.choices(backbone))
        return {"stage": _PLACED} | sites | encode_training(configuration, self.learning_rate)

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Draw a guided configuration, each of its numbers evenly; see `SearchSpace.draw`."""
        return self.suggest(DrawnTrial(generator, {"stage": _GUIDED}), backbone)

    def mutator(self, backbone: Backbone) -> SiteMutator:
        """Return moves by site, role or block, led by the first score; see `SearchSpace.mutator`."""
        choices = self.choices(backbone)
        return SiteMutator(
            learning_rate=learning_rate_bounds(self.learning_rate),
            choices=choices,
            values=site_values(scores_of(self.site_scores, self.scores[0]), choices),
        )

    def baselines(self, backbone: Backbone, trials: int | None = None) -> tuple[Baseline, ...]:
        """Return the head alone, the first score's allocation of each method, and more of the first."""
        rate = learning_rate_at(1.0, self.learning_rate)
        head = Baseline(name="head alone", configuration=Configuration({}, learning_rate=rate))
        small, *others = _ANCHORS
        anchors = [(small, method) for method in self.methods]
        anchors += [(anchor, self.methods[0]) for anchor in others]
        return chosen_baselines([head, *self._anchored(backbone, anchors)], trials)

    def _anchored(self, backbone: Backbone, anchors: Sequence[tuple[_Anchor, str]]) -> Iterator[Baseline]:
        low, high = self.budgets(backbone)
        blocks = self._highest_block(backbone) + 1
        for anchor, method in anchors:
            budget = round(low * (high / low) ** anchor.budget)
            lowest_block = min(round(anchor.lowest_block * blocks), blocks - 1)
            while not (adapters := self._anchor_of(backbone, method, budget, lowest_block)) and budget < high:
                budget *= 2  # no site's share was the smallest size
            rate = learning_rate_at(anchor.rate, self.learning_rate)
            what = self.scores[0] if method == self.methods[0] else f"{self.scores[0]}, {method}"
            yield Baseline(
                name=f"{what}, {budget:,} parameters from block {lowest_block} up at rate {rate:g}",
                configuration=Configuration(adapters, learning_rate=rate),
                is_trained_whole=anchor.is_trained_whole,
            )

    def _anchor_of(
        self, backbone: Backbone, method: str, budget: int, lowest_block: int
    ) -> dict[Site, Adapter]:
        return self._allocated(
            backbone,
            self.scores[0],
            method=method,
            temperature=min(max(0.5, self.temperature[0]), self.temperature[1]),
            budget=budget,
            placement=self.placement[1],
            lowest_block=lowest_block,
        )

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and every site at its largest."""
        rate = middle_learning_rate(self.learning_rate)
        largest = {}
        for site, methods in self.choices(backbone).items():
            ends = [choice.largest for choice in methods.values()]
            counts = {adapter: count_site(backbone, site, adapter) for adapter in ends}
            largest[site] = max(counts, key=counts.__getitem__)
        return Configuration({}, learning_rate=rate), Configuration(largest, learning_rate=rate)

    def count(self, backbone: Backbone) -> int:
        """Return the number of placements, which include the guided ones."""
        return math.prod(
            1 + sum(len(choice.sizes) for choice in methods.values())
            for methods in self.choices(backbone).values()
        )

    def describe(self, backbone: Backbone) -> str:
        """Say what is searched; see `SearchSpace.describe`."""
        low, high = (count_parameters(backbone, end) for end in self.extremes(backbone))
        (cheap, dear), top = self.budgets(backbone), self._highest_block(backbone)
        heat = f"{_TEMPERATURE} {describe_range(self.temperature)}, " if self._is_heated else ""
        return "\n".join(
            [
                f"ScoreGuided: {', '.join(self.scores)} place {', '.join(self.methods)} "
                f"({self.allocator}); budget {cheap:,} to {dear:,} parameters, {heat}placement "
                f"{describe_range(self.placement)}, lowest block 0 to {top}; any other placement near those",
                f"learning rate {describe_learning_rate(self.learning_rate)}",
                f"{self.count(backbone):.3g} configurations, {low:,} to {high:,} trainable parameters",
            ]
        )
