"""Expected hypervolume improvement for compute: the sampler that knows costs before training."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial

from autopeft.core.configuration import Configuration
from autopeft.core.errors import check_share, check_whole
from autopeft.models.backbone import Backbone
from autopeft.optimization.candidates import Candidates
from autopeft.optimization.expected_improvement import ExpectedImprovement, Features
from autopeft.optimization.proposal import History
from autopeft.search_spaces import SearchSpace

_MOST_PARENTS = 64  # of the front, those that add most: choosing a parent takes time for each
# Before a first trial does without a method that was not tried: 96 % find one that a third of the draws have.
_DRAWS_FOR_A_NEW_METHOD = 8


@dataclass(kw_only=True)
class EhviSampler:
    """Tries the candidate with the largest expected hypervolume improvement for its compute.

    What a candidate gains is worked out by `ExpectedImprovement`; the candidates are those of `Candidates`.
    Some trials are single-adapter probes: the best of the smallest adapters alone at one site, while there
    are sites where none was tried and the space has such points. The first trials, and a few later ones, are
    drawn by the space.

    It works with every `SearchSpace`, and depends on the seed, the trial's number and the history alone.

    Attributes:
        seed: With the trial's number, the only source of chance.
        startup_trials: Trials before the first that is chosen by expected gain, baselines included; of
            16 trials as many are baselines.
        modelled: Share of the later trials that are chosen by expected gain, in [0, 1]; the others are drawn
            by the space.
        probe_share: Share of these that are single-adapter probes, while there are any, in [0, 1].

    Raises:
        ValueError: A number is out of range.
    """

    seed: int = 0
    startup_trials: int = 4
    modelled: float = 0.95  # that a few are drawn keeps everything possible, as random trials do in SMAC
    probe_share: float = 0.5  # chosen on MiniLM alone (questions, spam)
    features: ClassVar[type[Features]] = Features  # what the models are given of a configuration

    def __post_init__(self) -> None:
        check_whole("startup_trials", self.startup_trials, what="a number of trials", least=1)
        check_share("modelled", self.modelled, of="trials")
        check_share("probe_share", self.probe_share, of="modelled trials")

    def choose(self, number: int, space: SearchSpace, backbone: Backbone, history: History) -> Configuration:
        """Return what a trial is to try; see `HistorySampler.choose`."""
        generator = random.Random(f"{self.seed}:{number}")
        if number < self.startup_trials:
            return _unlike(history, space, backbone, generator)
        if not history.front or generator.random() >= self.modelled:
            return space.draw(generator, backbone)
        best = sorted(history.front.items(), key=lambda item: -item[1])[:_MOST_PARENTS]
        gain = ExpectedImprovement(history, self.features.of(space, backbone))
        candidates = Candidates(space, backbone, dict(best), generator, history.earlier_rates, history.cuts)
        if self.probe_share and generator.random() < self.probe_share:
            # Ranked separately: the model underrates candidates far from the front.
            probes = candidates.probes(configuration for configuration, _ in history.trials)
            worth = gain.per_compute(probes)
            probes = [probe for probe, share in zip(probes, worth, strict=True) if share > 0]
            if (first := gain.best(probes)) is not None:
                return probes[first]
        pool = candidates.pool(gain.per_compute)
        first = gain.best(pool)
        return space.draw(generator, backbone) if first is None else pool[first]


def encoded(
    space: SearchSpace, configuration: Configuration, backbone: Backbone
) -> tuple[dict[str, Any], dict[str, BaseDistribution]]:
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
