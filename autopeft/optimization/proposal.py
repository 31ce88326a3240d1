"""What a sampler is told of a search, and the trial that it proposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import Constraint
from autopeft.core.pareto import Axis

if TYPE_CHECKING:  # reading a study loads no torch
    from autopeft.models.backbone import Backbone
    from autopeft.search_spaces import SearchSpace


def nothing_is_served(block: int) -> bool:
    """Say that trainings run all blocks, those below the lowest adapter too."""
    return False


@dataclass(frozen=True, kw_only=True)
class History:
    """What a search has found so far and what it is after."""

    # Configurations that were tried, each with the values known of it: all objectives of a complete trial,
    # only the costs of one that broke a constraint, none of one that is being trained. Where a training
    # failed, its metrics are the worst there are; where it is paused, those it is expected to reach.
    trials: Sequence[tuple[Configuration, Mapping[str, float]]]
    axes: Sequence[Axis]
    # Configurations of the front, each with what it adds to the hypervolume.
    front: Mapping[Configuration, float] = field(default_factory=dict)
    # What is left of trials that were cut to points of the front: structures to train from scratch.
    cuts: Sequence[Configuration] = ()
    constraints: Sequence[Constraint] = ()  # bounds on what is exact before training
    # How many trainings the values of each trial are the means of; one each where empty.
    trainings: Sequence[int] = ()
    # Summed learning rates that were good in earlier searches, by method.
    earlier_rates: Mapping[str, float] = field(default_factory=dict)
    # Whether trainings whose lowest adapter sits in a block (or, where it is their number, that have the head
    # alone) read kept hidden states in place of running the blocks below.
    are_states_served: Callable[[int], bool] = nothing_is_served


@runtime_checkable
class HistorySampler(Protocol):
    """A sampler that is told a search's history, where Optuna's read a study."""

    def choose(self, number: int, space: SearchSpace, backbone: Backbone, history: History) -> Configuration:
        """Return the point of the space that the trial of a number is to try."""


Sampler = BaseSampler | HistorySampler
"""What chooses the next configuration."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial that is to begin.

    What Optuna's trials have as well is named as there.
    """

    configuration: Configuration
    params: Mapping[str, Any]  # the same, as the space's parameters
    distributions: Mapping[str, BaseDistribution]  # what the parameters are from
    baseline: str | None = None  # the name of the baseline that it is; None where it is another configuration
    # What an Optuna sampler noted of the trial, as genetic ones note its generation; they look for it when
    # they are asked again.
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
