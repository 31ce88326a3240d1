"""An Optuna trial whose parameters are written in one piece."""

from __future__ import annotations

import copy
from typing import Any

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.storages import InMemoryStorage
from optuna.trial import Trial

_OF_A_TRIAL = {"_cached_frozen_trial", "_fixed_params", "_relative_params", "relative_search_space"}
_OF_ALL_TRIALS = ("_suggest", "relative_params")
_OF_A_STORAGE = ("_lock", "_studies", "_get_trial", "_set_trial", "check_trial_is_updatable")


class GatheredTrial(Trial):
    """A trial of a study in memory that writes its parameters at once, as Optuna would write each of them.

    Optuna copies a trial three times a parameter, with all the parameters it has by then: of 120 parameters
    that take as long as TPE's own computation. What the sampler has said of all parameters together, or the
    caller has fixed, is gathered here until `write`; whatever else is asked goes Optuna's way.

    Args:
        trial: A trial that `Study.ask` has made, and that nothing was asked of.
    """

    def __init__(self, trial: Trial) -> None:
        # Without the parent's: that would announce the trial to the sampler a second time.
        vars(self).update(vars(trial))
        # The study's own object until something is written: it is not to be changed here.
        own = self._cached_frozen_trial = copy.copy(trial._cached_frozen_trial)
        own.params, own.distributions = dict(own.params), dict(own.distributions)
        self._gathered: dict[str, tuple[float, BaseDistribution]] = {}

    @classmethod
    def of(cls, trial: Trial) -> Trial:
        """Return a trial that gathers; the trial itself where its storage, or its Optuna, is another."""
        storage = trial.storage
        known = (
            isinstance(storage, InMemoryStorage)
            and vars(trial).keys() >= _OF_A_TRIAL
            and all(hasattr(Trial, name) for name in _OF_ALL_TRIALS)
            and all(hasattr(storage, name) for name in _OF_A_STORAGE)
            and hasattr(storage._studies.get(trial.study._study_id), "param_distribution")
        )
        return cls(trial) if known else trial

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        cached = self._cached_frozen_trial
        known = None if name in cached.distributions else self._known(name, distribution)
        if known is None:
            self.write()
            return super()._suggest(name, distribution)
        value, internal, distribution = known
        self._gathered[name] = internal, distribution
        cached.distributions[name] = distribution
        cached.params[name] = value
        return value

    def _known(self, name: str, distribution: BaseDistribution) -> tuple[Any, float, BaseDistribution] | None:
        """Return the value that is known for a parameter, as it is and as Optuna stores it, and of what."""
        if name in self._fixed_params:
            value = self._fixed_params[name]
        elif distribution.single():
            return None  # Optuna asks no sampler for it
        else:
            if self._relative_params is None:
                self.write()  # the sampler is to see what was fixed
            values = self.relative_params
            assert self.relative_search_space is not None
            shared = self.relative_search_space.get(name)
            if name not in values or shared is None or not _alike(shared, distribution):
                return None
            value, distribution = values[name], shared  # one object for all trials is quickly compared
        internal = distribution.to_internal_repr(value)
        return (value, internal, distribution) if distribution._contains(internal) else None

    def write(self) -> None:
        """Write what was gathered to the study.

        Raises:
            ValueError: A parameter is of another kind than in the study's other trials; nothing is written.
        """
        if not self._gathered:
            return
        storage = self.storage
        assert isinstance(storage, InMemoryStorage)
        with storage._lock:
            trial = copy.copy(storage._get_trial(self._trial_id))
            storage.check_trial_is_updatable(self._trial_id, trial.state)
            known = storage._studies[self.study._study_id].param_distribution
            new = {name: one for name, (_, one) in self._gathered.items() if known.get(name) is not one}
            for name, distribution in new.items():
                check_distribution_compatibility(known.get(name, distribution), distribution)
            values = {name: one.to_external_repr(value) for name, (value, one) in self._gathered.items()}
            known.update(new)
            trial.params = {**trial.params, **values}
            trial.distributions = {
                **trial.distributions,
                **{name: one for name, (_, one) in self._gathered.items()},
            }
            storage._set_trial(self._trial_id, trial)
        self._gathered = {}


def _alike(one: BaseDistribution, other: BaseDistribution) -> bool:
    """Whether two distributions are equal, which Optuna looks at choice by choice."""
    return one is other or (type(one) is type(other) and vars(one) == vars(other))
