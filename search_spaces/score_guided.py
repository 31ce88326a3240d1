"""ScoreGuided: a few numbers say how a score's best sites share a budget; the front is refined by site."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna.trial import FixedTrial

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_share, check_whole, unknown_choice
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.methods import count_parameters, count_site
from autopeft.models.backbone import Backbone
from autopeft.optimization.expected_improvement import ExpectedImprovement, Features
from autopeft.optimization.learning_rate_prior import LearningRatePrior
from autopeft.optimization.local_search import local_search
from autopeft.optimization.single_adapter_probes import single_adapter_probes
from autopeft.search_spaces.base import (
    Baseline,
    History,
    LearningRate,
    SearchSpace,
    SuggestTrial,
    check_range,
    checked_learning_rate,
    checked_names,
    describe_learning_rate,
    describe_range,
    distinct,
    draw_learning_rate,
    encode_learning_rate,
    learning_rate_at,
    middle_learning_rate,
    scores_of,
    suggest_learning_rate,
)
from autopeft.search_spaces.mutation import Mutator, SizedMethod
from autopeft.search_spaces.per_layer import PerLayer
from autopeft.search_spaces.score_allocation import Allocation, site_values
from autopeft.search_spaces.site_encoding import encode_sites, suggest_sites
from autopeft.sensitivity import SCORES, SiteScores

_GUIDED = "guided"
_REFINED = "refined"
_FEWEST_SITES_SHARE = 8  # the smallest budget is a unit of size at an eighth of the sites
# Of a baseline: the place of its budget on a log scale, the share of blocks left free, the place of
# its rate.
# Two have one budget: where rates and sizes go together, a model takes one for the other. The higher rate,
# which may come to nothing, goes on after a rung only if it is promising.
_BASELINES = ((0.1, 0.83, 1.0), (0.35, 0.67, 0.6), (0.35, 0.67, 0.8))
_TRAINED_WHOLE = 2  # of these, and the head alone: three trainings tell what is gained after a rung
_DRAWN = 32  # candidates of a pool that are drawn anew
_REFINED_CANDIDATES = 128  # and that are made from the front


@dataclass(frozen=True, kw_only=True)
class ScoreGuided(SearchSpace):
    """A score ranks the sites; budget, temperature and placement turn it into the size of every adapter.

    Six or seven dimensions whatever the number of blocks: budget, temperature, placement, lowest block,
    learning rate, and score and method where there are several. From `guided_trials` on, most trials are
    chosen from a pool: guided configurations drawn anew, and refined ones, which are configurations of the
    front changed at single sites, roles or blocks in the full per-layer space (resize, drop, add, cross
    over). From the best of them a local search leads to more. The one with the largest expected gain in
    hypervolume for its compute is tried; see `ExpectedImprovement`. Some are single-adapter probes.

    Attributes:
        scores: Scores to choose from, of `autopeft.sensitivity.SCORES`. The search computes them once.
        methods: Methods with a size to choose from: lora, series, parallel, prefix. A guided configuration
            has one of them, a refined one may mix them.
        ranks: (smallest, largest) rank of LoRA.
        widths: (smallest, largest) bottleneck width of series and parallel adapters.
        prefix_lengths: (smallest, largest) prefix length.
        roles: Roles that may carry an adapter; None for all that a method can sit on.
        temperature: (lowest, highest) power of the scores: 0 is the same size everywhere.
        placement: (smallest, largest) share of the sites that may carry an adapter.
        modelled: Share of the trials that are chosen by expected gain, in [0, 1]; the sampler asks for the
            others.
        probe_share: Share of those that are chosen from lone adapters, while there are any, in [0, 1].
        guided_trials: Trials before the first that is chosen so, baselines included.
        learning_rate: A number, or (lowest, highest) to search it on a log scale.
        options: Options fixed for a method, as in `{"lora": {"alpha": 16}}`.
        site_scores: The scores of the backbone on the task; a `Search` fills them in.

    Raises:
        ValueError: A score, method, role, option or bound is not valid.
    """

    scores: Sequence[str] = ("gradient_norm", "gora", "explained_variance")
    methods: Sequence[str] = ("lora",)
    ranks: tuple[int, int] = (1, 64)
    widths: tuple[int, int] = (1, 64)
    prefix_lengths: tuple[int, int] = (1, 32)
    roles: Sequence[str] | None = None
    temperature: tuple[float, float] = (0.0, 1.5)
    placement: tuple[float, float] = (0.2, 1.0)
    modelled: float = 0.95
    probe_share: float = 0.5
    guided_trials: int = 4
    learning_rate: LearningRate = (3e-4, 1e-2)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    site_scores: Mapping[str, SiteScores] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", checked_names("score", self.scores, SCORES))
        sized = [name for name, one in METHOD_SPECS.items() if one.size_name is not None]
        object.__setattr__(self, "methods", checked_names("method with a size", self.methods, sized))
        object.__setattr__(self, "learning_rate", checked_learning_rate(self.learning_rate))
        self._per_layer()
        check_range("temperature", self.temperature, 0.0, math.inf)
        check_range("placement", self.placement, 0.0, 1.0)
        if self.placement[0] <= 0:
            raise ValueError(f"placement is a share of the sites above 0, got {self.placement!r}.")
        check_share("modelled", self.modelled, of="trials")
        check_share("probe_share", self.probe_share, of="modelled trials")
        check_whole("guided_trials", self.guided_trials, what="a number of trials", least=1)

    def _per_layer(self) -> PerLayer:
        """Return the per-layer space with the same methods and sizes; it checks them."""
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

    def choices(self, backbone: Backbone) -> dict[Site, dict[str, SizedMethod]]:
        """Return the methods that each site takes, with their sizes."""
        found: dict[Site, dict[str, SizedMethod]] = {}
        for method in self.methods:
            sized = self._sized(method)
            for site in Allocation(budget=1, method=method, roles=self.roles).candidates(backbone):
                found.setdefault(site, {})[method] = sized
        return dict(sorted(found.items()))

    def _sized(self, method: str) -> SizedMethod:
        sizes = [one.size or 1 for one in self._per_layer().adapters_of(method)]
        options = self.options.get(method, {})
        return SizedMethod(method=method, smallest=sizes[0], largest=sizes[-1], options=options)

    def validate(self, backbone: Backbone) -> None:
        """Raise ValueError for a role the backbone lacks and for a method no role can take."""
        self._per_layer().validate(backbone)

    def budgets(self, backbone: Backbone) -> tuple[int, int]:
        """Return the smallest and the largest budget.

        The smallest pays for the smallest adapter at an eighth of the sites: below it almost nothing is
        left to place. The largest pays for the largest adapter everywhere.
        """
        smallest = dict.fromkeys(self.methods, 0)
        largest = dict.fromkeys(self.methods, 0)
        for site, methods in self.choices(backbone).items():
            for method, sized in methods.items():
                smallest[method] += count_site(backbone, site, sized.of_size(sized.smallest))
                largest[method] += count_site(backbone, site, sized.of_size(sized.largest))
        return max(1, min(smallest.values()) // _FEWEST_SITES_SHARE), max(largest.values())

    def suggest(self, trial: SuggestTrial, backbone: Backbone) -> Configuration:
        """Ask for the few numbers, or in a refined trial for every site; see `SearchSpace.suggest`."""
        stage = trial.suggest_categorical("stage", (_GUIDED, _REFINED))
        if stage == _GUIDED:
            adapters = self._suggest_guided(trial, backbone)
        else:
            adapters = suggest_sites(trial, self.choices(backbone))
        rate = suggest_learning_rate(trial, self.learning_rate)
        return Configuration(adapters, learning_rate=rate)

    def _suggest_guided(self, trial: SuggestTrial, backbone: Backbone) -> dict[Site, Adapter]:
        low, high = self.budgets(backbone)
        score = trial.suggest_categorical("score", tuple(self.scores))
        method = trial.suggest_categorical("method", tuple(self.methods))
        budget = trial.suggest_int("budget", low, high, log=True)
        temperature = trial.suggest_float("temperature", *self.temperature)
        placement = trial.suggest_float("placement", *self.placement)
        lowest_block = trial.suggest_int("lowest_block", 0, self._highest_block(backbone))
        return self._allocated(
            backbone,
            score,
            budget=budget,
            method=method,
            temperature=temperature,
            placement=placement,
            lowest_block=lowest_block,
        )

    def _highest_block(self, backbone: Backbone) -> int:
        """Return the highest block in which every method finds a site."""
        found = [
            max(site.block for site, methods in self.choices(backbone).items() if name in methods)
            for name in self.methods
        ]
        return min(found)

    def _allocated(
        self, backbone: Backbone, score: str, *, method: str, temperature: float, **allocation: Any
    ) -> dict[Site, Adapter]:
        sized = self._sized(method)
        adapters = Allocation(
            method=method,
            largest=sized.largest,
            roles=self.roles,
            allocator_options={"temperature": temperature},
            options=dict(sized.options),
            **allocation,
        ).adapters(backbone, scores_of(self.site_scores, score))
        return {site: one for site, one in adapters.items() if (one.size or 0) >= sized.smallest}

    def encode(self, configuration: Configuration, backbone: Backbone) -> dict[str, Any]:
        """Return the parameters of a refined trial; see `SearchSpace.encode`."""
        sites = encode_sites(configuration, self.choices(backbone))
        rate = encode_learning_rate(configuration.learning_rate, self.learning_rate)
        return {"stage": _REFINED} | sites | rate

    def proposes(self, number: int) -> bool:
        """Say yes: every trial is guided or refined."""
        return True

    def propose(
        self,
        number: int,
        front: Mapping[Configuration, float],
        generator: random.Random,
        backbone: Backbone,
        history: History,
    ) -> dict[str, Any]:
        """Leave the trial to the sampler, or choose the best of a pool; see `SearchSpace.propose`."""
        if number < self.guided_trials or not front or generator.random() >= self.modelled:
            return {"stage": _GUIDED}
        gain = ExpectedImprovement(history, self.features(backbone))
        if self.probe_share and generator.random() < self.probe_share:
            # By themselves: models seldom think much of what is unlike the front.
            lone = self._lone(front, generator, backbone, history)
            lone = [one for one, worth in zip(lone, gain.per_compute(lone), strict=True) if worth > 0]
            if (first := gain.best(lone)) is not None:
                return self.encode(lone[first], backbone)
        refiner = self._refiner(backbone)
        pool = self._pool(front, refiner, generator, backbone)
        climbed = local_search([one for one, _ in pool], gain.per_compute, refiner, generator) if pool else []
        pool += [(one, None) for one in climbed]
        best = gain.best([one for one, _ in pool])
        if best is None:
            return {"stage": _GUIDED}
        configuration, drawn = pool[best]
        rate = encode_learning_rate(configuration.learning_rate, self.learning_rate)
        return self.encode(configuration, backbone) if drawn is None else drawn | rate

    def _refiner(self, backbone: Backbone) -> Mutator:
        choices, rate = self.choices(backbone), self.learning_rate
        return Mutator(
            choices=choices,
            values=site_values(scores_of(self.site_scores, self.scores[0]), choices),
            learning_rate=(rate, rate) if isinstance(rate, float) else rate,
        )

    def features(self, backbone: Backbone) -> Features:
        """Return what the models are given of a configuration."""
        fewest, most = (count_parameters(backbone, one) for one in self.extremes(backbone))
        return Features(
            backbone=backbone,
            choices=self.choices(backbone),
            methods=self.methods,
            learning_rate=self.learning_rate,
            parameters=(fewest, most),
        )

    def _pool(
        self,
        front: Mapping[Configuration, float],
        refiner: Mutator,
        generator: random.Random,
        backbone: Backbone,
    ) -> list[tuple[Configuration, dict[str, Any] | None]]:
        """Return candidates, each with the parameters it was drawn by; a changed one of the front has none.

        Each stands there with two learning rates, its own and one of a sum near what the front has. The head
        alone is not among them: it is a baseline, and would often be tried again for the noise in its
        metric.
        """
        rate = self.learning_rate
        found: list[tuple[Configuration, dict[str, Any] | None]] = []
        for _ in range(_DRAWN):
            drawn = self._draw(generator, backbone)
            found.append((self.suggest(FixedTrial(drawn), backbone), drawn))
        found += [(refiner.child(front, generator), None) for _ in range(_REFINED_CANDIDATES)]
        found = [(one, drawn) for one, drawn in found if len(one)]
        if not isinstance(rate, float):
            known = LearningRatePrior(front, backbone, rate)
            found += [(one.replace(learning_rate=known.draw(one, generator)), drawn) for one, drawn in found]
        return found

    def _lone(
        self, front: Iterable[Configuration], generator: random.Random, backbone: Backbone, history: History
    ) -> list[Configuration]:
        """Return lone adapters where none was tried, with learning rates of a sum near what the front has."""
        rate, tried = self.learning_rate, (one for one, _ in history.trials)
        found = single_adapter_probes(self.choices(backbone), tried, learning_rate_at(1.0, rate))
        known = None if isinstance(rate, float) else LearningRatePrior(front, backbone, rate)
        return [one.replace(learning_rate=known.draw(one, generator)) if known else one for one in found]

    def _draw(self, generator: random.Random, backbone: Backbone) -> dict[str, Any]:
        """Draw the parameters of a guided trial evenly, the budget on a log scale."""
        low, high = self.budgets(backbone)
        budget = round(low * (high / low) ** generator.random())
        return {
            "stage": _GUIDED,
            "score": generator.choice(self.scores),
            "method": generator.choice(self.methods),
            "budget": min(max(budget, low), high),
            "temperature": generator.uniform(*self.temperature),
            "placement": generator.uniform(*self.placement),
            "lowest_block": generator.randint(0, self._highest_block(backbone)),
            **encode_learning_rate(draw_learning_rate(generator, self.learning_rate), self.learning_rate),
        }

    def baselines(self, backbone: Backbone) -> tuple[Baseline, ...]:
        """Return the head alone, and the first score's allocation at a few small budgets.

        Large ones are dear, and tried when models promise something: which rates are good comes first.
        """
        rate = learning_rate_at(1.0, self.learning_rate)
        low, high = self.budgets(backbone)
        blocks = self._highest_block(backbone) + 1
        found = [Baseline(name="head alone", configuration=Configuration({}, learning_rate=rate))]
        for index, (place, lowest_share, rate_place) in enumerate(_BASELINES):
            budget = round(low * (high / low) ** place)
            lowest_block = min(round(lowest_share * blocks), blocks - 1)
            while not (adapters := self._anchor_of(backbone, budget, lowest_block)) and budget < high:
                budget *= 2  # no site's share was the smallest size
            rate = learning_rate_at(rate_place, self.learning_rate)
            name = f"{self.scores[0]}, {budget:,} parameters from block {lowest_block} up at rate {rate:g}"
            chosen = Configuration(adapters, learning_rate=rate)
            found.append(Baseline(name=name, configuration=chosen, is_trained_whole=index < _TRAINED_WHOLE))
        return distinct(found)

    def _anchor_of(self, backbone: Backbone, budget: int, lowest_block: int) -> dict[Site, Adapter]:
        return self._allocated(
            backbone,
            self.scores[0],
            method=self.methods[0],
            temperature=min(max(0.5, self.temperature[0]), self.temperature[1]),
            budget=budget,
            placement=self.placement[1],
            lowest_block=lowest_block,
        )

    def extremes(self, backbone: Backbone) -> tuple[Configuration, Configuration]:
        """Return the head alone, and every site at its largest."""
        rate = middle_learning_rate(self.learning_rate)
        largest = {
            site: max(
                (sized.of_size(sized.largest) for sized in methods.values()),
                key=lambda one: count_site(backbone, site, one),
            )
            for site, methods in self.choices(backbone).items()
        }
        return Configuration({}, learning_rate=rate), Configuration(largest, learning_rate=rate)

    def count(self, backbone: Backbone) -> int:
        """Return the number of refined configurations, which include the guided ones."""
        return math.prod(
            1 + sum(sized.largest - sized.smallest + 1 for sized in methods.values())
            for methods in self.choices(backbone).values()
        )

    def describe(self, backbone: Backbone) -> str:
        """Say what is searched; see `SearchSpace.describe`."""
        low, high = (count_parameters(backbone, one) for one in self.extremes(backbone))
        (cheap, dear), top = self.budgets(backbone), self._highest_block(backbone)
        return "\n".join(
            [
                f"ScoreGuided: {', '.join(self.scores)} place {', '.join(self.methods)}; budget "
                f"{cheap:,} to {dear:,} parameters, temperature {describe_range(self.temperature)}, "
                f"placement {describe_range(self.placement)}, lowest block 0 to {top}",
                f"from trial {self.guided_trials} on, {self.modelled:.0%} of the trials are those with the "
                "largest expected gain in hypervolume for their compute, of a pool or of lone adapters "
                f"({self.probe_share:.0%}, while there are any)",
                f"learning rate {describe_learning_rate(self.learning_rate)}",
                f"{self.count(backbone):.3g} configurations, {low:,} to {high:,} trainable parameters",
            ]
        )
