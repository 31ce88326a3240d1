"""A trial's parameters for every site: no adapter, or a method and its size."""

from __future__ import annotations

from typing import Any

from autopeft.core.adapter import Adapter, Site
from autopeft.core.configuration import Configuration
from autopeft.search_spaces.base import SuggestTrial
from autopeft.search_spaces.mutation import Choices
from autopeft.search_spaces.site_groups import OFF


def suggest_sites(trial: SuggestTrial, choices: Choices) -> dict[Site, Adapter]:
    """Ask for the method of every site, or none, and for its size.

    Args:
        trial: Is asked.
        choices: The methods there are for every site.
    """
    adapters = {}
    for site, methods in choices.items():
        method = trial.suggest_categorical(f"{site}.method", (OFF, *methods))
        if method != OFF:
            sized = methods[method]
            name = f"{site}.{method}_size"
            adapters[site] = sized.of_size(trial.suggest_int(name, sized.smallest, sized.largest, log=True))
    return adapters


def encode_sites(configuration: Configuration, choices: Choices) -> dict[str, Any]:
    """Return the parameters with which `suggest_sites` gives a configuration's adapters.

    Args:
        configuration: One adapter a site at most.
        choices: The methods there are for every site.

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
        for one in several:
            if one.method not in methods or one != methods[one.method].of_size(one.size or 0):
                raise ValueError(f"{one} is none of the choices for {site}.")
            parameters[f"{site}.{one.method}_size"] = one.size
    return parameters
