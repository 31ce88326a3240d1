"""Single-adapter probes: configurations of one adapter, the smallest there is, at one site."""

from __future__ import annotations

from collections.abc import Iterable

from autopeft.core.configuration import Configuration
from autopeft.search_spaces.method_choice import Choices


def single_adapter_probes(
    choices: Choices, tried: Iterable[Configuration], learning_rate: float
) -> list[Configuration]:
    """Return the smallest adapter of every method alone at every site where none of it was tried alone.

    Few sites can do with so little, and scores hardly tell which (`benchmarks/single_adapter_probes.py`).

    Args:
        choices: The methods there are for every site.
        tried: Configurations that were tried.
        learning_rate: Of all of them.
    """
    alone = (configuration for configuration in tried if len(configuration.adapters) == 1)
    known = {(site, adapter.method) for configuration in alone for site, adapter in configuration}
    return [
        Configuration({site: choice.smallest}, learning_rate=learning_rate)
        for site, methods in choices.items()
        for name, choice in methods.items()
        if (site, name) not in known
    ]
