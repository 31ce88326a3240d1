"""Expected hypervolume improvement for compute: the sampler that knows costs before training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_share, check_whole
from autopeft.models.backbone import Backbone
from autopeft.optimization.expected_improvement import ExpectedImprovement, Features
from autopeft.optimization.history import History
from autopeft.optimization.learning_rate_prior import LearningRatePrior
from autopeft.optimization.local_search import local_search
from autopeft.optimization.single_adapter_probes import single_adapter_probes
from autopeft.search_spaces import SearchSpace
from autopeft.search_spaces.learning_rates import learning_rate_at
from autopeft.search_spaces.mutation import Mutator

_DRAWN_CANDIDATES = 32  # of a pool: what is unlike the front is seldom best, but is not to be missed
_MUTATED_CANDIDATES = 128  # of a pool: most of what is best is near the front
_MOST_PARENTS = 64  # of the front, those that add most: choosing a parent takes time for each
_DRAWS_FOR_A_NEW_METHOD = 8  # before a first trial does without a method that was not tried


class EhviSampler(BaseSampler):
    """Tries the candidate with the largest expected hypervolume improvement for its compute.

    The candidates are a pool (points drawn by the space, points near the front) and what a local search leads
    to from the best of them. What a training reaches is modelled by a Gaussian process whose kernel compares
    placements (`GaussianProcess`); trainable parameters are counted, and other costs that are exact before
    training are modelled without noise. The gain is integrated over the part of the objectives' unit cube
    that no trial dominates, and divided by what a training step takes. See `ExpectedImprovement`.

    Some trials are single-adapter probes: the best of the smallest adapters alone at one site, while there
    are sites where none was tried and the space has such points. The first trials, and a few later ones, are
    drawn by the space.

    It works with every `SearchSpace`, and depends on the seed, the trial's number and the history alone. A
    search hands it the history (`learn`); as an Optuna sampler it may then be asked from any study.

    Sources: Emmerich, Giannakoglou and Naujoks, "Single- and Multiobjective Evolutionary Optimization
    Assisted by Gaussian Random Field Metamodels" (2006); Snoek, Larochelle and Adams, "Practical Bayesian
    Optimization of Machine Learning Algorithms" (2012), for the gain for compute; Hutter, Hoos and
    Leyton-Brown, "Sequential Model-Based Optimization for General Algorithm Configuration" (2011), for the
    local search.

    Args:
        seed: With the trial's number, the only source of chance.
        startup_trials: Trials before the first that is chosen by expected gain, baselines included.
        modelled: Share of the later trials that are chosen by expected gain, in [0, 1]; the others are drawn
            by the space.
        probe_share: Share of these that are single-adapter probes, while there are any, in [0, 1].

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        startup_trials: int = 4,
        modelled: float = 0.95,
        probe_share: float = 0.5,
    ) -> None:
        check_whole("startup_trials", startup_trials, what="a number of trials", least=1)
        check_share("modelled", modelled, of="trials")
        check_share("probe_share", probe_share, of="modelled trials")
        self.seed = seed
        self.startup_trials = startup_trials
        self.modelled = modelled
        self.probe_share = probe_share
        self._learned: tuple[SearchSpace, Backbone, History] | None = None
        self._chosen: tuple[dict[str, Any], dict[str, BaseDistribution]] = {}, {}

    def __repr__(self) -> str:
        return (
            f"EhviSampler(startup_trials={self.startup_trials}, modelled={self.modelled:g}, "
            f"probe_share={self.probe_share:g})"
        )

    def choose(self, number: int, space: SearchSpace, backbone: Backbone, history: History) -> Configuration:
        """Return what a trial is to try.

        Args:
            number: The trial's number.
            space: What to choose from.
            backbone: The backbone.
            history: Every trial so far, and what the search is after.
        """
        generator = random.Random(f"{self.seed}:{number}")
        if number < self.startup_trials:
            return _unlike(history, space, backbone, generator)
        if not history.front or generator.random() >= self.modelled:
            return space.draw(generator, backbone)
        best = sorted(history.front.items(), key=lambda item: -item[1])[:_MOST_PARENTS]
        gain = ExpectedImprovement(history, self.features(space, backbone))
        candidates = _Candidates(space, backbone, dict(best), generator)
        if self.probe_share and generator.random() < self.probe_share:
            # By themselves: models seldom think much of what is unlike the front.
            probes = candidates.probes(history)
            worth = gain.per_compute(probes)
            probes = [probe for probe, share in zip(probes, worth, strict=True) if share > 0]
            if (first := gain.best(probes)) is not None:
                return probes[first]
        pool = candidates.pool()
        if pool:
            pool += local_search(pool, gain.per_compute, candidates.mutator, generator)
        first = gain.best(pool)
        return space.draw(generator, backbone) if first is None else pool[first]

    def features(self, space: SearchSpace, backbone: Backbone) -> Features:
        """Return what the models are given of a configuration."""
        return Features.of(space, backbone)

    def learn(self, space: SearchSpace, backbone: Backbone, history: History) -> None:
        """Remember what the search has found, for the trials that a study asks next."""
        self._learned = space, backbone, history

    def reseed_rng(self) -> None:
        """Do nothing: chance follows from the seed and the trial's number."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Choose, and return the parameters that the choice has; none before `learn` was called."""
        self._chosen = {}, {}
        if self._learned is not None:
            space, backbone, history = self._learned
            configuration = self.choose(trial.number, space, backbone, history)
            self._chosen = encoded(space, configuration, backbone)
        return self._chosen[1]

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the parameters of what was chosen."""
        return self._chosen[0]

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw a parameter that is none of the space's."""
        generator = random.Random(f"{self.seed}:{trial.number}:{param_name}")
        sampler = RandomSampler(seed=generator.getrandbits(32))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def encoded(
    space: SearchSpace, configuration: Configuration, backbone: Backbone
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
    """Return the parameters of a point of a space, and the distributions they are from."""
    parameters = space.encode(configuration, backbone)
    trial = FixedTrial(parameters)
    space.suggest(trial, backbone)
    return parameters, trial.distributions


def _unlike(
    history: History, space: SearchSpace, backbone: Backbone, generator: random.Random
) -> Configuration:
    """Draw a point that has a method which no trial had, where a few draws give any."""
    tried = {method for configuration, _ in history.trials for method in configuration.methods}
    drawn = [space.draw(generator, backbone) for _ in range(_DRAWS_FOR_A_NEW_METHOD)]
    return max(drawn, key=lambda configuration: len(set(configuration.methods) - tried))


class _Candidates:
    """What one trial may try.

    Args:
        space: What to choose from.
        backbone: The backbone.
        front: Configurations of the front, each with what it adds to the hypervolume.
        generator: The trial's.
    """

    def __init__(
        self,
        space: SearchSpace,
        backbone: Backbone,
        front: Mapping[Configuration, float],
        generator: random.Random,
    ) -> None:
        self._space, self._backbone, self._generator = space, backbone, generator
        self._front = front
        self.mutator: Mutator = space.mutator(backbone)
        rate = space.learning_rate
        self._rates = None if isinstance(rate, float) else LearningRatePrior(front, backbone, rate)

    def pool(self) -> list[Configuration]:
        """Return drawn points and points near the front.

        Each stands there with two learning rates, its own and one of a sum near what the front has. The head
        alone is not among them: it is a baseline, and would often be tried again for the noise in its
        metric.
        """
        found = [self._space.draw(self._generator, self._backbone) for _ in range(_DRAWN_CANDIDATES)]
        found += [self.mutator(self._front, self._generator) for _ in range(_MUTATED_CANDIDATES)]
        found = [candidate for candidate in found if candidate.adapters]
        return found + (self._with_near_rates(found) if self._rates is not None else [])

    def probes(self, history: History) -> list[Configuration]:
        """Return single adapters where none was tried, with learning rates of a sum near the front's."""
        rate = learning_rate_at(1.0, self._space.learning_rate)
        tried = (configuration for configuration, _ in history.trials)
        probes = single_adapter_probes(self._space.choices(self._backbone), tried, rate)
        return self._with_near_rates([probe for probe in probes if self._is_point(probe)])

    def _with_near_rates(self, candidates: Sequence[Configuration]) -> list[Configuration]:
        rates = self._rates
        if rates is None:
            return list(candidates)
        return [
            candidate.replace(learning_rate=rates.draw(candidate, self._generator))
            for candidate in candidates
        ]

    def _is_point(self, configuration: Configuration) -> bool:
        try:
            self._space.encode(configuration, self._backbone)
        except ValueError:
            return False
        return True
