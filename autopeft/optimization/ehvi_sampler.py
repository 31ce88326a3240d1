"""Expected hypervolume improvement for compute: the sampler that knows costs before training."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FixedTrial, FrozenTrial

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_share, check_whole
from autopeft.models.backbone import Backbone
from autopeft.optimization.candidates import Candidates
from autopeft.optimization.expected_improvement import ExpectedImprovement, Features
from autopeft.optimization.proposal import History
from autopeft.search_spaces import SearchSpace

_MOST_PARENTS = 64  # of the front, those that add most: choosing a parent takes time for each
_DRAWS_FOR_A_NEW_METHOD = 8  # before a first trial does without a method that was not tried


Encoded = tuple[dict[str, Any], dict[str, BaseDistribution]]
"""Parameters of a point of a space, and the distributions they are from."""


@dataclass(kw_only=True)
class EhviSampler(BaseSampler):
    """Tries the candidate with the largest expected hypervolume improvement for its compute.

    What a candidate gains is worked out by `ExpectedImprovement`; the candidates are those of `Candidates`.
    Some trials are single-adapter probes: the best of the smallest adapters alone at one site, while there
    are sites where none was tried and the space has such points. The first trials, and a few later ones, are
    drawn by the space.

    It works with every `SearchSpace`, and depends on the seed, the trial's number and the history alone. A
    search hands the history to `choose`; after `learn` any Optuna study may ask.

    Attributes:
        seed: With the trial's number, the only source of chance.
        startup_trials: Trials before the first that is chosen by expected gain, baselines included.
        modelled: Share of the later trials that are chosen by expected gain, in [0, 1]; the others are drawn
            by the space.
        probe_share: Share of these that are single-adapter probes, while there are any, in [0, 1].

    Raises:
        ValueError: A number is out of range.
    """

    seed: int = 0
    startup_trials: int = 4
    modelled: float = 0.95
    probe_share: float = 0.5
    features: ClassVar[type[Features]] = Features  # what the models are given of a configuration
    _learned: tuple[SearchSpace, Backbone, History] | None = field(
        default=None, init=False, repr=False, compare=False
    )
    _chosen: Encoded = field(default=({}, {}), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_whole("startup_trials", self.startup_trials, what="a number of trials", least=1)
        check_share("modelled", self.modelled, of="trials")
        check_share("probe_share", self.probe_share, of="modelled trials")

    def choose(self, number: int, space: SearchSpace, backbone: Backbone, history: History) -> Configuration:
        """Return what the trial of a number is to try."""
        generator = random.Random(f"{self.seed}:{number}")
        if number < self.startup_trials:
            return _unlike(history, space, backbone, generator)
        if not history.front or generator.random() >= self.modelled:
            return space.draw(generator, backbone)
        best = sorted(history.front.items(), key=lambda item: -item[1])[:_MOST_PARENTS]
        gain = ExpectedImprovement(history, self.features.of(space, backbone))
        candidates = Candidates(space, backbone, dict(best), generator, history.earlier_rates)
        if self.probe_share and generator.random() < self.probe_share:
            # By themselves: models seldom think much of what is unlike the front.
            probes = candidates.probes(configuration for configuration, _ in history.trials)
            worth = gain.per_compute(probes)
            probes = [probe for probe, share in zip(probes, worth, strict=True) if share > 0]
            if (first := gain.best(probes)) is not None:
                return probes[first]
        pool = candidates.pool(gain.per_compute)
        first = gain.best(pool)
        return space.draw(generator, backbone) if first is None else pool[first]

    def learn(self, space: SearchSpace, backbone: Backbone, history: History) -> None:
        """Remember what a search has found, for the trials that a study asks next."""
        self._learned = space, backbone, history

    def reseed_rng(self) -> None:
        """Do nothing: chance follows from the seed and the trial's number."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Choose, and return the parameters that the choice has; none before `learn` was called."""
        self._chosen = {}, {}
        if self._learned is not None:
            space, backbone, _ = self._learned
            self._chosen = encoded(space, self.choose(trial.number, *self._learned), backbone)
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


def encoded(space: SearchSpace, configuration: Configuration, backbone: Backbone) -> Encoded:
    """Return the parameters of a point of a space, and the distributions they are from."""
    params = space.encode(configuration, backbone)
    trial = FixedTrial(params)
    space.suggest(trial, backbone)
    return params, trial.distributions


def _unlike(
    history: History, space: SearchSpace, backbone: Backbone, generator: random.Random
) -> Configuration:
    """Draw a point that has a method which no trial had, where a few draws give any."""
    tried = {method for configuration, _ in history.trials for method in configuration.methods}
    drawn = [space.draw(generator, backbone) for _ in range(_DRAWS_FOR_A_NEW_METHOD)]
    return max(drawn, key=lambda configuration: len(set(configuration.methods) - tried))
