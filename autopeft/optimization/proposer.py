"""What is tried next: a baseline, or what the sampler chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Constraint, Objective
from autopeft.core.pareto import Axis
from autopeft.core.profiling import section
from autopeft.models.backbone import Backbone
from autopeft.optimization.ehvi_sampler import EhviSampler, encoded
from autopeft.optimization.history import history_of, nothing_is_served
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.search_spaces import SearchSpace


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


class Proposer:
    """Says what trials try; the same records and the same number give the same configuration.

    Args:
        space: What to choose from.
        backbone: The backbone.
        sampler: An `EhviSampler`, which is handed the history, or a sampler that reads an Optuna study.
        objectives: The search's.
        axes: The axes of the hypervolume.
        constraints: The search's.
        baselines: Whether the space's baselines come first.
        trials: Trials of the budget, by which the number of baselines goes; None where it has no such bound.
        forecast: Returns what trials that paused are expected to reach; None where trials do not pause.
        are_states_served: Whether trainings read kept hidden states; see `History`.
        view: Returns a study with the sampler and every trial so far, running ones included. It is asked for
            one trial. Needed for an Optuna sampler.
    """

    def __init__(
        self,
        space: SearchSpace,
        backbone: Backbone,
        sampler: BaseSampler,
        *,
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        constraints: Sequence[Constraint] = (),
        baselines: bool = True,
        trials: int | None = None,
        forecast: Callable[[Sequence[TrialRecord]], Forecast] | None = None,
        are_states_served: Callable[[int], bool] = nothing_is_served,
        view: Callable[[], Study] | None = None,
    ) -> None:
        self._space = space
        self._backbone = backbone
        self._sampler = sampler
        self._objectives = objectives
        self._axes = axes
        self._constraints = constraints
        self._baselines = space.baselines(backbone, trials) if baselines else ()
        self._forecast = forecast
        self._are_states_served = are_states_served
        self._view = view

    @section("ask")
    def propose(
        self, number: int, records: Sequence[TrialRecord], pending: Sequence[Configuration] = ()
    ) -> Proposal:
        """Return what a trial is to try.

        Args:
            number: The trial's number.
            records: Every finished and paused trial.
            pending: What is being trained for the first time.
        """
        return self._baseline(records, pending) or self._sampled(number, records, pending)

    def _baseline(self, records: Sequence[TrialRecord], pending: Sequence[Configuration]) -> Proposal | None:
        """Return the next baseline that was not tried; None where there is none left."""
        tried = {record.baseline for record in records}
        for baseline in self._baselines:
            if baseline.name not in tried and baseline.configuration not in pending:
                parameters, distributions = encoded(self._space, baseline.configuration, self._backbone)
                return Proposal(
                    configuration=baseline.configuration,
                    parameters=parameters,
                    distributions=distributions,
                    baseline=baseline.name,
                )
        return None

    def _sampled(
        self, number: int, records: Sequence[TrialRecord], pending: Sequence[Configuration]
    ) -> Proposal:
        if not isinstance(self._sampler, EhviSampler):
            return self._asked()
        history = history_of(
            records,
            self._objectives,
            self._axes,
            self._constraints,
            forecast=None if self._forecast is None else self._forecast(records),
            are_states_served=self._are_states_served,
            pending=pending,
        )
        configuration = self._sampler.choose(number, self._space, self._backbone, history)
        parameters, distributions = encoded(self._space, configuration, self._backbone)
        return Proposal(configuration=configuration, parameters=parameters, distributions=distributions)

    def _asked(self) -> Proposal:
        """Ask a sampler that reads an Optuna study."""
        if self._view is None:
            raise ValueError(f"The sampler {self._sampler!r} reads an Optuna study: pass view=....")
        study = self._view()
        trial = study.ask()
        configuration = self._space.suggest(trial, self._backbone)
        (frozen,) = (known for known in study.get_trials(deepcopy=False) if known.number == trial.number)
        return Proposal(
            configuration=configuration,
            parameters=trial.params,
            distributions=trial.distributions,
            attributes=frozen.system_attrs,
        )
