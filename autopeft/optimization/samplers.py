"""Samplers by name, Optuna's seeded by trial: a resumed search asks what an uninterrupted one asks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler

from autopeft.core.entry_points import load_entry_point
from autopeft.core.errors import unknown_choice
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.proposal import HistorySampler, Sampler

_POPULATION = 20  # Optuna's 50 would leave a search of 60 trials one generation; this leaves it three


def _botorch(*, seed: int) -> BaseSampler:
    try:
        from optuna_integration import BoTorchSampler
    except ImportError as error:
        raise ValueError(
            "The sampler 'botorch' needs the extra autopeft[botorch] (optuna-integration, botorch)."
        ) from error
    sampler: BaseSampler = BoTorchSampler(seed=seed)
    return sampler


SAMPLERS: Mapping[str, Callable[..., BaseSampler]] = {
    "tpe": partial(TPESampler, multivariate=True),
    "nsga2": partial(NSGAIISampler, population_size=_POPULATION),
    "nsga3": partial(NSGAIIISampler, population_size=_POPULATION),
    "random": RandomSampler,
    "gp": GPSampler,
    "botorch": _botorch,
}
"""By name, what makes an Optuna sampler from `seed=`; NSGA-II and NSGA-III suit 60 trials or more."""


def reads_study(sampler: str | Sampler) -> bool:
    """Whether a sampler may be one of Optuna's that reads the trials so far, with their parameters."""
    if isinstance(sampler, str):
        return sampler not in ("ehvi", "random")
    return isinstance(sampler, BaseSampler) and type(sampler) is not RandomSampler


def make_sampler(sampler: str | Sampler, seed: int, number: int = 0) -> Sampler:
    """Return the sampler that chooses a trial.

    With a new one for each trial, what is asked depends on the seed, the trial's number and the study alone,
    and not on whether the search was interrupted. A sampler of the caller's is used as it is.
    A name may be that of an entry point `autopeft.samplers`, which makes a sampler from `seed=`.
    """
    if isinstance(sampler, BaseSampler | HistorySampler):
        return sampler
    if sampler == "ehvi":
        return EhviSampler(seed=seed)
    make = SAMPLERS.get(sampler) or load_entry_point("samplers", sampler)
    if make is None:
        raise unknown_choice("sampler", sampler, ("ehvi", *SAMPLERS))
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made: Sampler = make(seed=int.from_bytes(digest[:4], "big"))
    return made
