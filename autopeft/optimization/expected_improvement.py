"""What a candidate is expected to add to the hypervolume for its compute, from the trials so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import qmc

from autopeft.core.adapter import Site
from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.objectives import Objective
from autopeft.core.pareto import non_dominated
from autopeft.core.rank_allocation import RANK_ALLOCATIONS
from autopeft.methods import count_parameters, count_site
from autopeft.models.backbone import Backbone
from autopeft.optimization.gaussian_process import Array, GaussianProcess, Inputs
from autopeft.optimization.proposal import History
from autopeft.search_spaces import SearchSpace
from autopeft.search_spaces.learning_rates import learning_rate_bounds, log_place, summed_learning_rate
from autopeft.search_spaces.method_choice import Choices

_LEARNED_TRIALS = 128  # that a model learns from at most: its time grows with their third power, to 0.4 s
_CELLS = 4096  # of the unit cube: the standard error of a gain of 1 % is 0.16 %
# Of what all blocks take in a step: head, loop and optimizer. It bounds how much cheaper a step can look (a
# fifth). SmolLM2's output layer has 0.27 of its blocks' weights; of MiniLM's measured steps it is below 0.1.
_COMPUTE_BESIDE_BLOCKS = 0.25
# Learning rates by less than this factor apart are taken for the same: a factor of 25 moved the loss of 35
# models in a published sweep by 0.015 in the median.
_SAME_RATE_FACTOR = 1.2
# Of summed learning rates: as far apart as the ends of another feature. Chosen on MiniLM alone (questions,
# spam).
_RATE_UNIT = math.log(20)
_COUNTED = ("trainable_parameters", "adapter_parameters")
_Feature = TypeVar("_Feature")


def _once(feature: Callable[[Any, Configuration], _Feature]) -> Callable[[Any, Configuration], _Feature]:
    """Work a feature out once for all configurations of the same adapters, whatever their rates."""

    @wraps(feature)
    def worked_out(features: Features, configuration: Configuration) -> _Feature:
        key = feature.__name__, configuration.adapters, configuration.allocation
        if key not in features._known:
            features._known[key] = feature(features, configuration)
        found: _Feature = features._known[key]
        return found

    return worked_out


@dataclass(frozen=True, kw_only=True)
class Features:
    """The numbers that say most about what a configuration costs and reaches.

    Of both: the number of parameters on a log scale. Of what it costs: the share of the blocks that no
    gradients go through, of the sites that carry an adapter, and of each method. Of what it reaches: the
    summed learning rate on a log scale, how its ranks are allocated, and its placement, one number a site;
    searches whose models were told the methods found worse fronts (`benchmarks/families.py`). All lie in
    [0, 1] but the summed rate, 1 for one adapter at the highest rate. See `benchmarks/surrogate.py`.
    """

    backbone: Backbone  # counts blocks and parameters
    choices: Choices  # the methods there are for every site, or the first of several that carry the same
    methods: Sequence[str]
    highest_rate: float
    parameters: tuple[int, int]  # (fewest, most) trainable parameters
    allocations: Sequence[str] = ()  # ways to allocate ranks in training

    @classmethod
    def of(cls, space: SearchSpace, backbone: Backbone) -> Self:
        """Return the features of a space's configurations on a backbone."""
        choices = space.choices(backbone)
        used = {method for methods in choices.values() for method in methods}
        fewest, most = (count_parameters(backbone, end) for end in space.ends(backbone))
        return cls(
            backbone=backbone,
            choices=choices,
            methods=[method for method in METHOD_SPECS if method in used],
            highest_rate=learning_rate_bounds(space.learning_rate)[1],
            parameters=(fewest, most),
            allocations=space.allocations,
        )

    def of_metric(self, configuration: Configuration) -> list[float]:
        """Return the features that say what a configuration reaches, its placement apart."""
        summed = 1 + math.log(summed_learning_rate(configuration) / self.highest_rate) / _RATE_UNIT
        allocated = [float(configuration.allocation == name) for name in self.allocations]
        return [summed, self._size(configuration), *allocated]

    def of_cost(self, configuration: Configuration) -> list[float]:
        """Return the features that say what a configuration costs."""
        adapted = sum(site in self._columns for site in configuration.adapters) / len(self.choices)
        shares = self.method_shares(configuration)
        return [self.frozen_share(configuration), adapted, self._size(configuration), *shares]

    @_once
    def _size(self, configuration: Configuration) -> float:
        return log_place(max(self.count(configuration), self.parameters[0]), *self.parameters)

    @_once
    def method_shares(self, configuration: Configuration) -> list[float]:
        """Return the share of each method but the first, which is implied by the others'."""
        methods = [adapter.method for _, adapter in configuration]
        return [methods.count(name) / max(1, len(methods)) for name in self.methods[1:]]

    @_once
    def count(self, configuration: Configuration) -> int:
        """Return the number of trainable parameters of a configuration.

        Where ranks are allocated in training, about that of what is left.
        """
        count = count_parameters(self.backbone, configuration)
        if configuration.allocation is None:
            return count
        allocation = RANK_ALLOCATIONS[configuration.allocation]
        allocated = sum(
            count_site(self.backbone, site, adapter)
            for site, adapter in configuration
            if adapter.method == allocation.method
        )
        return round(count - (1 - allocation.kept) * allocated)

    @cached_property
    def _known(self) -> dict[tuple[object, ...], Any]:
        """What was worked out before."""
        return {}

    def compute(self, configuration: Configuration, are_states_served: Callable[[int], bool]) -> float:
        """Return what a training step takes, as a multiple of what it takes in all blocks, forward and back.

        `are_states_served` says of a block whether kept hidden states are read in place of running the others
        below it.
        """
        below = self.backbone.blocks_below(configuration.lowest_block)
        spared = self.frozen_share(configuration)
        if are_states_served(below):
            spared += below / len(self.backbone.places)
        # A backward pass through frozen weights takes about as long as a forward pass.
        return _COMPUTE_BESIDE_BLOCKS + 1 - spared / 2

    def frozen_share(self, configuration: Configuration) -> float:
        """Return the share of the blocks through which no gradients go."""
        *_, last = self.backbone.stacks  # what is in others gets its gradients through it
        sites = (
            site
            for site, adapter in configuration
            if adapter.specification.backpropagates or site.stack != last
        )
        lowest = next((site.place for site in sites), None)
        return self.backbone.blocks_below(lowest) / len(self.backbone.places)

    @_once
    def placement(self, configuration: Configuration) -> list[float]:
        """Return a number for every site: 0 for no adapter, 0.5 for the smallest and 1 for the largest."""
        places = [0.0] * len(self.choices)
        for site, several in configuration.adapters.items():
            if (column := self._columns.get(site)) is not None:
                choices = self.choices[site]
                places[column] = max(choices[adapter.method].place(adapter) for adapter in several)
        return places

    @cached_property
    def _columns(self) -> dict[Site, int]:
        return {site: column for column, site in enumerate(self.choices)}

    def inputs(self, configurations: Sequence[Configuration], objective: Objective) -> Inputs:
        """Return what a model of a metric or of a cost is given."""
        if objective.is_metric:
            features = np.array([self.of_metric(configuration) for configuration in configurations])
            return Inputs(features, np.array([self.placement(each) for each in configurations]))
        costs = np.array([self.of_cost(configuration) for configuration in configurations])
        return Inputs(costs, placements=np.empty((len(configurations), 0)))


class ExpectedImprovement:
    """Expected hypervolume improvement of candidates, by models of what is not known of them yet.

    A metric is modelled with noise, by features and placement. A cost is modelled by the features alone, from
    which it nearly follows, and without noise where it is exact before training: counting memory takes longer
    than asking a model. Parameters are counted. The expectation is the integral, over the
    part of the unit cube that no trial dominates, of the probability that the candidate does (Emmerich,
    Giannakoglou and Naujoks, "Single- and Multiobjective Evolutionary Optimization Assisted by Gaussian
    Random Field Metamodels", 2006), times the probability that it keeps the constraints.
    """

    def __init__(self, history: History, features: Features) -> None:
        self._history, self._features = history, features
        self._tried = [configuration for configuration, _ in history.trials]
        self._trainings = np.array(history.trainings or [1] * len(self._tried), dtype=np.float64)
        objectives = [axis.objective for axis in history.axes]
        names, trials = [objective.name for objective in objectives], enumerate(history.trials)
        placed = [place for place, (_, values) in trials if all(name in values for name in names)]
        flags = non_dominated([history.trials[place][1] for place in placed], objectives)
        self._front = frozenset(place for place, flag in zip(placed, flags, strict=True) if flag)
        self._placed = self._learned_from(placed)
        objectives += [constraint.objective for constraint in history.constraints]
        self._models = {
            objective.name: self._model(objective)
            for objective in dict.fromkeys(objectives)
            if objective.name not in _COUNTED
        }
        self._cells = self._not_dominated()
        self._known: dict[Configuration, float] = {}
        self._is_served = cache(history.are_states_served)

    def _model(self, objective: Objective) -> GaussianProcess:
        name, trials = objective.name, enumerate(self._history.trials)
        known = {place: values[name] for place, (_, values) in trials if name in values}
        places = self._learned_from(list(known))
        return GaussianProcess(
            self._inputs(places, objective),
            np.array([_scaled(objective, known[place]) for place in places]),
            None if objective.before_training else self._trainings[places],
            linear=not objective.is_metric,
            exact=objective.before_training,
        )

    def _inputs(self, places: Sequence[int], objective: Objective) -> Inputs:
        return self._features.inputs([self._tried[place] for place in places], objective)

    def _learned_from(self, places: Sequence[int]) -> list[int]:
        """Return the trials that a model learns from, so many at most.

        First comes what adds most to the front, then repeated trials, the latest first: their means are the
        most reliable data. Then come the latest of the others.
        """

        def order(place: int) -> tuple[bool, float, bool, int]:
            share = self._history.front.get(self._tried[place], 0.0)
            return place not in self._front, -share, self._trainings[place] == 1, -place

        return sorted(sorted(places, key=order)[:_LEARNED_TRIALS])

    def _not_dominated(self) -> Array:
        """Return points spread evenly over the part of the unit cube that no trial dominates.

        A trial stands at the model's mean, not at the measured value, which favours lucky runs (Picheny,
        Wagner and Ginsbourger, "A benchmark of kriging-based infill criteria for noisy optimization", 2013).
        """
        axes, positions = self._history.axes, []
        for axis in axes:
            name = axis.objective.name
            reached = [self._history.trials[place][1][name] for place in self._placed]
            if not axis.objective.before_training:
                mean, _ = self._models[name].predict(self._inputs(self._placed, axis.objective))
                reached = (np.exp(mean) if axis.objective.log_scale else mean).tolist()
            positions.append([axis.position(value) for value in reached])
        cells = _cells(len(axes))
        free = np.ones(len(cells), dtype=bool)
        for position in zip(*positions, strict=True):
            free &= (cells > position).any(axis=1)
        return cells[free]

    def __call__(self, candidates: Sequence[Configuration]) -> Array:
        """Return the expected gain of each candidate, a share of the unit cube."""
        reached = np.ones((len(candidates), len(self._cells)))
        axes = zip(self._history.axes, self._cells.T, strict=True)
        # Costs first: of what they leave out, which is most, no probability is worked out.
        for axis, places in sorted(axes, key=lambda pair: pair[0].objective.is_metric):
            mean, deviation = self._predicted(axis.objective, candidates)
            worst, best = _scaled(axis.objective, axis.worst), _scaled(axis.objective, axis.best)
            bounds = worst + (best - worst) * places
            reached *= _kept(axis.objective, mean[:, None], deviation[:, None], bounds, reached > 0)
        gain: Array = reached.sum(axis=1) / _CELLS
        for constraint in self._history.constraints:
            mean, deviation = self._predicted(constraint.objective, candidates)
            bound = np.array(_scaled(constraint.objective, constraint.bound))
            gain *= _kept(constraint.objective, mean, deviation, bound, gain > 0)
        return gain

    def per_compute(self, candidates: Sequence[Configuration]) -> Array:
        """Return the expected gain of each candidate for its compute, worked out once.

        The gain is divided by what a training step takes, as in Snoek, Larochelle and Adams, "Practical
        Bayesian Optimization of Machine Learning Algorithms" (2012).
        """
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in self._known]
        if new:
            compute = [self._features.compute(candidate, self._is_served) for candidate in new]
            self._known |= dict(zip(new, (self(new) / compute).tolist(), strict=True))
        return np.array([self._known[candidate] for candidate in candidates])

    def best(self, candidates: Sequence[Configuration]) -> int | None:
        """Return the index of the candidate that gains most for its compute; None where all were tried.

        What has the adapters of a trial counts as tried where its learning rate is within a fifth of that
        trial's: it would be chosen for the noise in its metric, again and again.
        """
        ranking = np.argsort(-self.per_compute(candidates), kind="stable")
        return next((index for index in ranking.tolist() if not self._was_tried(candidates[index])), None)

    def _was_tried(self, candidate: Configuration) -> bool:
        return any(
            trial.adapters == candidate.adapters
            and trial.allocation == candidate.allocation
            and _is_near(trial.learning_rate, candidate.learning_rate)
            for trial in self._tried
        )

    def _predicted(self, objective: Objective, candidates: Sequence[Configuration]) -> tuple[Array, Array]:
        """Return mean and standard deviation of an objective, on a log scale where it has one."""
        if objective.name not in _COUNTED:
            return self._models[objective.name].predict(self._features.inputs(candidates, objective))
        features = self._features
        head = features.backbone.head_parameters if objective.name == "adapter_parameters" else 0
        counts = (features.count(candidate) - head for candidate in candidates)
        return np.array([_scaled(objective, count) for count in counts]), np.zeros(len(candidates))


def _is_near(rate: float, other: float) -> bool:
    return abs(math.log(rate / other)) < math.log(_SAME_RATE_FACTOR)


def _kept(
    objective: Objective, mean: Array, deviation: Array, bound: Array, asked: NDArray[np.bool_]
) -> Array:
    """Return the probability of being at least as good as a bound.

    Of what is not exact, it is worked out where `asked`, and 0 elsewhere.
    """
    better = mean - bound if objective.direction == "maximize" else bound - mean
    if not deviation.any():  # it is exact
        return (better >= 0).astype(np.float64)
    known = np.where(better >= 0, np.inf, -np.inf)
    standard = np.divide(better, deviation, out=known, where=deviation > 0)
    probability = np.zeros_like(standard)
    probability[asked] = ndtr(standard[asked])
    return probability


def _scaled(objective: Objective, value: float) -> float:
    if not objective.log_scale:
        return value
    # Counts may be 0: the head alone has no adapter parameters. No measured value is as low as 1e-300.
    return math.log(max(value, 1.0 if objective.before_training else 1e-300))


@cache
def _cells(axes: int) -> Array:
    cells: Array = qmc.Sobol(axes, scramble=True, rng=np.random.default_rng(0)).random(_CELLS)
    return cells
