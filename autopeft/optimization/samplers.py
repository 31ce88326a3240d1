"""Samplers by name, Optuna's seeded by trial: a resumed search asks what an uninterrupted one asks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.errors import unknown_choice
from autopeft.optimization.ehvi_sampler import EhviSampler

SamplerFactory = Callable[[int], BaseSampler]

_STARTUP_TRIALS = 10
_POPULATION = 20


def _tpe(seed: int) -> BaseSampler:
    return TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP_TRIALS)


def _nsga2(seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=_POPULATION)


def _nsga3(seed: int) -> BaseSampler:
    return NSGAIIISampler(seed=seed, population_size=_POPULATION)


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)


def _botorch(seed: int) -> BaseSampler:
    try:
        from optuna_integration import BoTorchSampler
    except ImportError as error:
        raise ValueError(
            "The sampler 'botorch' needs the extra autopeft[botorch] (optuna-integration, botorch)."
        ) from error
    sampler: BaseSampler = BoTorchSampler(seed=seed, n_startup_trials=_STARTUP_TRIALS)
    return sampler


SAMPLERS: Mapping[str, SamplerFactory] = {
    "tpe": _tpe,
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "random": _random,
    "gp": _gp,
    "botorch": _botorch,
}
"""By name, what makes a sampler from a seed.

TPE models the parameters that all trials have jointly, and the others one by one: with `group=True`, which
models these jointly too, an ask takes ten times as long where trials differ in their parameters. NSGA-II and
NSGA-III suit searches of at least 60 trials.
"""


def make_sampler(sampler: str | BaseSampler, seed: int) -> BaseSampler:
    """Return the sampler of a search.

    Args:
        sampler: "ehvi", a name of `SAMPLERS`, or an Optuna sampler, which is used as it is: whether a resumed
            search then repeats an uninterrupted one is up to that sampler.
        seed: Seed of the search.

    Raises:
        ValueError: The name is unknown, or the sampler's extra is not installed.
    """
    if isinstance(sampler, BaseSampler):
        return sampler
    if sampler == "ehvi":
        return EhviSampler(seed=seed)
    if sampler not in SAMPLERS:
        raise unknown_choice("sampler", sampler, ("ehvi", *SAMPLERS))
    return SeededSampler(SAMPLERS[sampler], seed)


class SeededSampler(BaseSampler):
    """Makes a new sampler for each trial, seeded by the search's seed and the trial's number.

    A sampler's state is its random generator; everything else it reads from the study. With a new sampler
    for each trial, what is asked depends on the seed and the study alone, and so does not on whether the
    search was interrupted.

    Args:
        factory: Makes a sampler from a seed.
        seed: Seed of the search.
    """

    def __init__(self, factory: SamplerFactory, seed: int) -> None:
        self._factory = factory
        self._seed = seed
        self._sampler = self._make(0)

    def _make(self, number: int) -> BaseSampler:
        digest = hashlib.sha256(f"{self._seed}:{number}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return self._factory(int.from_bytes(digest[:4], "big"))

    def reseed_rng(self) -> None:
        """Do nothing: seeds follow from trial numbers."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Make the trial's sampler."""
        self._sampler = self._make(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Ask the trial's sampler."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Ask the trial's sampler."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Ask the trial's sampler."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """Tell the trial's sampler."""
        self._sampler.after_trial(study, trial, state, values)
