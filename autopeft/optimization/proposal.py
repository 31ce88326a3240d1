"""A trial that is to begin, as a sampler proposed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution

from autopeft.core.configuration import Configuration


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial that is to begin.

    Attributes:
        configuration: What it tries.
        parameters: The same, as the space's parameters.
        distributions: What the parameters are from.
        baseline: The name of the baseline that it is; None where it is another configuration.
        attributes: What an Optuna sampler noted of the trial, as genetic ones note its generation; they look
            for it when they are asked again.
    """

    configuration: Configuration
    parameters: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    baseline: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
