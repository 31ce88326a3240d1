"""A trial's parameters for every site: no adapter, or a method and its size."""

from __future__ import annotations

from typing import Any

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.search_spaces.method_choice import Choices
from autopeft.search_spaces.site_groups import OFF
from autopeft.search_spaces.suggest_trial import SuggestTrial


def suggest_sites(trial: SuggestTrial, choices: Choices) -> dict[Site, Adapter]:
    """Ask for the method of every site, or none, and for its size.

    Args:
        trial: Is asked.
        choices: The methods there are for every site, each with all sizes between two.
    """
    adapters = {}
    for site, methods in choices.items():
        method = trial.suggest_categorical(f"{site}.method", (OFF, *methods))
        if method != OFF:
            choice = methods[method]
            low, high = choice.sizes[0], choice.sizes[-1]
            adapters[site] = choice.of_size(trial.suggest_int(f"{site}.{method}_size", low, high, log=True))
    return adapters


def encode_sites(configuration: Configuration, choices: Choices) -> dict[str, Any]:
    """Return the parameters with which `suggest_sites` gives a configuration's adapters.

    Args:
        configuration: One adapter a site at most.
        choices: The methods there are for every site, each with all sizes between two.

    Raises:
        ValueError: An adapter is none of the choices for its site.
    """
    if outside := configuration.adapters.keys() - choices.keys():
        raise ValueError(f"{min(outside)} is no site of this space.")
    parameters: dict[str, Any] = {}
    for site, methods in choices.items():
        several = configuration.adapters.get(site, ())
        if len(several) > 1:
            raise ValueError(f"{site} takes one adapter, got {len(several)}.")
        parameters[f"{site}.method"] = several[0].method if several else OFF
        for adapter in several:
            if adapter.method not in methods or adapter != methods[adapter.method].of_size(adapter.size or 0):
                raise ValueError(f"{adapter} is none of the choices for {site}.")
            parameters[f"{site}.{adapter.method}_size"] = adapter.size
    return parameters
