"""ScoreGuided: a few numbers say how a score's best sites share a budget; near them lies every placement."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_choice, checked_names
from autopeft.core.method_specs import METHOD_SPECS, PeftSpec
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.base import Baseline
from autopeft.search_spaces.method_choice import MethodChoice, placed
from autopeft.search_spaces.method_space import SlotSpace
from autopeft.search_spaces.score_allocation import SCORES_WITH_SPECTRA, Allocation
from autopeft.search_spaces.suggest_trial import DrawnTrial, SuggestTrial
from autopeft.sensitivity import SCORES
from autopeft.sensitivity.allocation import ALLOCATORS

_GUIDED, _PLACED = "guided", "placed"
_ALL_STACKS = "all"
_TEMPERATURE = "temperature"
# The smallest budget pays for the smallest adapter at an eighth of the sites: with fewer there is little to
# allocate, and changed configurations of the front and single-adapter probes have them.
_FEWEST_SITES_SHARE = 8


class _GuidedBaseline(NamedTuple):
    """The places of budget and rate on their log scales, the share of blocks without adapters."""

    budget: float
    lowest_block: float
    rate: float
    is_trained_whole: bool


# Small ones: large ones are tried when a model promises something of them. Two share a budget and differ in
# rate, so that a model can tell rate from size. The higher rate, which may come to nothing, goes on
# after a rung only if it is promising; three whole trainings (the head alone is the third) say what is gained
# after a rung. In the top third of the blocks a step takes two thirds of the compute, a third where hidden
# states are kept; the smallest has half as many blocks. Budgets and rates were chosen on MiniLM alone
# (questions, spam). At a hidden size of 4,096, the rates in trainings of 100 steps or more are 1.2e-3, 4.1e-4
# and 8.3e-4; published sweeps found 3e-4 to 1e-3 best, for adapters everywhere.
_GUIDED_BASELINES = (
    _GuidedBaseline(budget=0.1, lowest_block=5 / 6, rate=0.9, is_trained_whole=True),
    _GuidedBaseline(budget=0.35, lowest_block=2 / 3, rate=0.6, is_trained_whole=True),
    _GuidedBaseline(budget=0.35, lowest_block=2 / 3, rate=0.8, is_trained_whole=False),
)


@dataclass(frozen=True, kw_only=True)
class ScoreGuided(SlotSpace):
    """A score ranks the sites; budget, temperature and placement turn it into the size of every adapter.

    Six or seven dimensions whatever the number of blocks: budget, temperature, placement, lowest block,
    learning rate, and score, method and stacks (all or one) where there are several. These are the guided
    configurations, which `draw` gives. The space has every other placement of its methods and sizes too, so
    that a sampler can change single sites, roles or blocks of what proved good (resize, drop, add, cross
    over). Further arguments, and the errors raised, are those of `MethodSpace`; all sizes between bounds are
    searched.

    Attributes:
        scores: Scores to choose from, of `autopeft.sensitivity.SCORES`. The search computes them once.
        methods: Methods with a size to choose from, such as lora, series, parallel and prefix; peft's other
            families are for `PerLayer`. A guided configuration has one of them, another may mix them.
        allocator: How the sites share a budget, of `autopeft.sensitivity.allocation.ALLOCATORS`:
            "proportional", "gora", "fisher" or "top_k"; or "explained_variance" or "water_filling", which
            read the spectra that the scores "gradient_spectrum" and "explained_variance" have.
        temperature: (lowest, highest) power of the scores, of the allocator "proportional": 0 is the same
            size everywhere, 1 what is in proportion to the scores.
        placement: (smallest, largest) share of the sites that may carry an adapter. The bounds of both were
            chosen on MiniLM alone (questions, spam).
    """

    scores: Sequence[str] = ("gradient_norm", "gora", "explained_variance")
    methods: Sequence[str] = ("lora",)
    allocator: str = "proportional"
    temperature: tuple[float, float] = (0.0, 1.5)
    placement: tuple[float, float] = (0.2, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", checked_names("score", self.scores, SCORES))
        sized = [
            name
            for name, method in METHOD_SPECS.items()
            if method.size_name is not None and not isinstance(method, PeftSpec)
        ]
        object.__setattr__(self, "methods", checked_names("method with a size", self.methods, sized))
        super().__post_init__()
        for key, given in self.sizes.items():
            if len(given) > 2:
                raise ValueError(
                    f"ScoreGuided searches all sizes between two bounds, got {given!r} for sizes[{key!r}]; "
                    "PerLayer and Uniform choose from a list of sizes."
                )
        _check_range("temperature", self.temperature, 0.0, math.inf)
        _check_range("placement", self.placement, 0.0, 1.0)
        if self.placement[0] <= 0:
            raise ValueError(f"placement is a share of the sites above 0, got {self.placement!r}.")
        check_choice("allocator", ALLOCATORS, self.allocator)
        if ALLOCATORS[self.allocator].evidence == "spectra":
            what = f"score with spectra, which the allocator {self.allocator!r} reads,"
            check_choice(what, SCORES_WITH_SPECTRA, *self.scores)

    @property
    def scores_needed(self) -> tuple[str, ...]:
        """The scores a search has to compute first."""
        return tuple(self.scores)

    def choice_of(self, method: str) -> MethodChoice:
        """Return a method with all sizes between its bounds."""
        ladder = super().choice_of(method)
        return replace(ladder, sizes=range(ladder.sizes[0], ladder.sizes[-1] + 1))

    def budgets(self, backbone: Backbone) -> tuple[int, int]:
        """Return the smallest and the largest budget.

        The smallest pays for the smallest adapter at an eighth of the sites: below it almost nothing is
        left to place. The largest pays for the largest adapter everywhere.
        """
        choices = [self.choice_of(method) for method in self.methods]
        smallest = min(self.cost_everywhere(choice.smallest, backbone) for choice in choices)
        largest = max(self.cost_everywhere(choice.largest, backbone) for choice in choices)
        return max(1, smallest // _FEWEST_SITES_SHARE), largest

    def suggest_adapters(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        """Ask for the few numbers, or for every site; see `SearchSpace.suggest_adapters`."""
        if trial.suggest_categorical("stage", (_GUIDED, _PLACED)) == _PLACED:
            slots = sorted(self.slots(backbone), key=lambda slot: slot.sites)
            asked = {slot.sites[0]: slot.suggest(trial, "conditional") for slot in slots}
            return {site: adapter for site, adapter in asked.items() if adapter is not None}
        low, high = self.budgets(backbone)
        return self._guided(
            backbone,
            trial.suggest_categorical("score", tuple(self.scores)),
            trial.suggest_categorical("method", tuple(self.methods)),
            budget=trial.suggest_int("budget", low, high, log=True),
            temperature=trial.suggest_float(_TEMPERATURE, *self.temperature) if self._is_heated else 0.0,
            placement=trial.suggest_float("placement", *self.placement),
            lowest_block=trial.suggest_int("lowest_block", 0, self._highest_block(backbone)),
            stacks=self._suggest_stacks(trial, backbone),
        )

    def _suggest_stacks(self, trial: SuggestTrial, backbone: Backbone) -> tuple[str, ...] | None:
        """Ask which stacks carry adapters: one of those that can, or all; None for all."""
        if len(backbone.stacks) == 1:
            return None
        chosen = trial.suggest_categorical("stacks", (_ALL_STACKS, *self._able_stacks(backbone)))
        return None if chosen == _ALL_STACKS else (chosen,)

    def _able_stacks(self, backbone: Backbone) -> list[str]:
        """Return the stacks in which every method finds a site."""
        of_methods = [{site.stack for site in sites} for sites in self._sites_of_methods(backbone)]
        return [stack for stack in backbone.stacks if all(stack in stacks for stacks in of_methods)]

    @property
    def _is_heated(self) -> bool:
        return _TEMPERATURE in ALLOCATORS[self.allocator].options

    def _highest_block(self, backbone: Backbone) -> int:
        """Return the highest block in which every method finds a site, in the longest stack's numbers."""
        longest = max(backbone.depths.values())
        highest = [{site.stack: site.block for site in sites} for sites in self._sites_of_methods(backbone)]
        return min(
            math.ceil((block + 1) * longest / backbone.depths[stack]) - 1
            for of_method in highest
            for stack, block in of_method.items()
        )

    def _sites_of_methods(self, backbone: Backbone) -> list[list[Site]]:
        slots = self.slots(backbone)
        return [sorted(placed(self.choice_of(method).smallest, slots)) for method in self.methods]

    def _guided(
        self, backbone: Backbone, score: str, method: str, *, temperature: float, **numbers: Any
    ) -> dict[Site, Adapter]:
        choice = self.choice_of(method)
        allocation = Allocation(
            choice=choice,
            allocator=self.allocator,
            roles=self.roles,
            allocator_options={_TEMPERATURE: temperature} if self._is_heated else {},
            **numbers,
        )
        adapters = allocation.adapters(backbone, self.scores_of(score))
        return {
            site: adapter for site, adapter in adapters.items() if adapter.size_or_zero >= choice.sizes[0]
        }

    def encode_adapters(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of every site; see `SearchSpace.encode_adapters`."""
        parameters: dict[str, Any] = {"stage": _PLACED}
        for slot in self.slots(backbone):
            parameters |= slot.encode(configuration)
        return parameters

    def draw(self, generator: random.Random, backbone: Backbone) -> Configuration:
        """Draw a guided configuration, each of its numbers evenly; see `SearchSpace.draw`."""
        return self.suggest(DrawnTrial(generator, {"stage": _GUIDED}), backbone)

    def all_baselines(self, backbone: Backbone) -> Iterator[Baseline]:
        """Yield the head alone, the first score's allocation of each method, and more of the first.

        At last come its smallest adapters in all MLPs, and everywhere.
        """
        yield Baseline(name="head alone", configuration=self.point(place=1.0))
        low, high = self.budgets(backbone)
        blocks = self._highest_block(backbone) + 1
        score, first = self.scores[0], self.methods[0]
        # Half way from the same size everywhere to sizes in proportion to the scores.
        temperature = min(max(0.5, self.temperature[0]), self.temperature[1])
        small, *others = _GUIDED_BASELINES
        wanted = [(small, method) for method in self.methods] + [(guided, first) for guided in others]
        for guided, method in wanted:
            budget = round(low * (high / low) ** guided.budget)
            lowest_block = min(round(guided.lowest_block * blocks), blocks - 1)
            numbers = {
                "temperature": temperature,
                "placement": self.placement[1],
                "lowest_block": lowest_block,
            }
            while not (adapters := self._guided(backbone, score, method, budget=budget, **numbers)):
                if budget >= high:
                    break
                budget *= 2  # no site's share was the smallest size
            point = self.point(adapters, guided.rate)
            yield Baseline(
                name=f"{score if method == first else f'{score}, {method}'}, {budget:,} parameters "
                f"from block {lowest_block} up at rate {point.learning_rate:g}",
                configuration=point,
                is_trained_whole=guided.is_trained_whole,
            )
        smallest = self.choice_of(first).smallest
        for where, slots in (("in the MLPs", self.ffn_slots(backbone)), ("everywhere", self.slots(backbone))):
            if adapters := placed(smallest, slots):
                yield Baseline(
                    name=f"{smallest} {where}", configuration=self.point(adapters), is_trained_whole=False
                )

    def summary(self, backbone: Backbone) -> str:
        """Say what is searched; see `SearchSpace.summary`."""
        (cheap, dear), top = self.budgets(backbone), self._highest_block(backbone)
        coldest, hottest, fewest, most = *self.temperature, *self.placement
        heat = f"{_TEMPERATURE} {coldest:g} to {hottest:g}, " if self._is_heated else ""
        stacks = f", in {', '.join(self._able_stacks(backbone))} or all" if len(backbone.stacks) > 1 else ""
        return (
            f"{', '.join(self.scores)} place {', '.join(self.methods)} ({self.allocator}); "
            f"budget {cheap:,} to {dear:,} parameters, {heat}placement {fewest:g} to {most:g}, "
            f"lowest block 0 to {top}{stacks}; any other placement near those"
        )


def _check_range(name: str, bounds: Any, low: float, high: float) -> None:
    numbers = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not numbers or not low <= bounds[0] <= bounds[1] <= high:
        raise ValueError(f"{name} is (lowest, highest), two numbers in [{low:g}, {high:g}], got {bounds!r}.")
