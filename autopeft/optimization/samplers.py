"""Samplers by name, seeded so that a resumed search asks what an uninterrupted one would have asked."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space.intersection import _calculate
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.errors import unknown_choice
from autopeft.optimization.remembering_tpe import Remembered, RememberingTPESampler

SamplerFactory = Callable[[int], BaseSampler]


class _RepeatableNSGAII(optuna.samplers.NSGAIISampler):
    """NSGA-II whose parents do not depend on the trial at which they are selected.

    Optuna keeps a generation's parents with the study in memory, in the order of their numbers; to the
    trial that selects them it gives them in the order of selection.
    """

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


class _RepeatableNSGAIII(optuna.samplers.NSGAIIISampler):
    """NSGA-III whose parents do not depend on the trial at which they are selected.

    It draws among equals, so that the generator has to be the generation's, not the trial's.
    """

    def select_parent(self, study: Study, generation: int) -> list[FrozenTrial]:
        generator = self._rng.rng
        state = generator.get_state()
        generator.seed(generation)
        try:
            parents = super().select_parent(study, generation)
        finally:
            generator.set_state(state)
        return sorted(parents, key=lambda trial: trial.number)


class _TPEFactory:
    """Make TPE samplers that share what they remember of finished trials."""

    def __init__(self) -> None:
        self._remembered = Remembered()

    def __call__(self, seed: int) -> BaseSampler:
        return RememberingTPESampler(seed, self._remembered)


def _nsga2(seed: int) -> BaseSampler:
    return _RepeatableNSGAII(seed=seed, population_size=20)


def _nsga3(seed: int) -> BaseSampler:
    return _RepeatableNSGAIII(seed=seed, population_size=20)


def _random(seed: int) -> BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=10)


def _botorch(seed: int) -> BaseSampler:
    try:
        from optuna_integration import BoTorchSampler
    except ImportError as error:
        raise ValueError(
            "The sampler 'botorch' needs the extra autopeft[botorch] (optuna-integration, botorch)."
        ) from error
    sampler: BaseSampler = BoTorchSampler(seed=seed, n_startup_trials=10)
    return sampler


SAMPLERS: Mapping[str, Callable[[], SamplerFactory]] = {
    "tpe": _TPEFactory,
    "nsga2": lambda: _nsga2,
    "nsga3": lambda: _nsga3,
    "random": lambda: _random,
    "gp": lambda: _gp,
    "botorch": lambda: _botorch,
}
"""By name, what makes a search's factory of samplers.

TPE models all parameters jointly; the populations suit searches of ≥ 60 trials.
"""


def make_sampler(sampler: str | BaseSampler, seed: int) -> BaseSampler:
    """Return the sampler of a search.

    Args:
        sampler: A name of `SAMPLERS`, or an Optuna sampler, which is used as it is: whether a resumed
            search then repeats an uninterrupted one is up to that sampler.
        seed: Seed of the search.

    Raises:
        ValueError: The name is unknown, or the sampler's extra is not installed.
    """
    if isinstance(sampler, BaseSampler):
        return sampler
    if sampler not in SAMPLERS:
        raise unknown_choice("sampler", sampler, SAMPLERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SeededSampler(SAMPLERS[sampler](), seed)


class SeededSampler(BaseSampler):
    """Make a new sampler for each trial, seeded by the search's seed and the trial's number.

    A sampler's state is its random generator, and everything else it reads from the study. With a
    generator that depends on the trial's number alone, a search that was killed asks the same
    configurations as one that was not.

    Args:
        factory: Makes a sampler from a seed.
        seed: Seed of the search.
    """

    def __init__(self, factory: SamplerFactory, seed: int) -> None:
        self._factory = factory
        self._seed = seed
        self._sampler = self._make(0)
        self._shared: dict[str, BaseDistribution] | None = None
        self._seen = -1

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
        """Return the parameters that all trials share.

        It is what the samplers with a joint model find themselves, but each anew over all trials; this
        one goes on from the last trial it saw.
        """
        if isinstance(self._sampler, optuna.samplers.RandomSampler):
            return {}
        trials = study.get_trials(deepcopy=False)
        # What `IntersectionSearchSpace.calculate` does, without a copy of every distribution.
        self._shared, self._seen = _calculate(trials, True, self._shared, self._seen)
        return {name: one for name, one in sorted((self._shared or {}).items()) if not one.single()}

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
