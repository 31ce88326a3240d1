"""What is tried next: a baseline, or what the sampler chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from optuna.samplers import BaseSampler
from optuna.study import Study

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Constraint, Objective
from autopeft.core.pareto import Axis, contributions, front_records
from autopeft.core.profiling import section
from autopeft.models.backbone import Backbone
from autopeft.optimization.ehvi_sampler import EhviSampler, encoded
from autopeft.optimization.history import History, nothing_is_served
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.samplers import make_sampler
from autopeft.search_spaces import SearchSpace


class Proposer:
    """Says what trials try; the same records and the same number give the same configuration.

    Args:
        space: What to choose from.
        backbone: The backbone.
        sampler: See `make_sampler`. An `EhviSampler` is handed the history, others read an Optuna study.
        objectives: The search's.
        axes: The axes of the hypervolume.
        view: Returns a study with every trial so far, running ones included; it is asked for one trial.
        seed: The search's.
        constraints: The search's.
        baselines: Whether the space's baselines come first.
        trials: Trials of the budget, by which the number of baselines goes; None where it has no such bound.
        forecast: Returns what trials that paused are expected to reach; None where trials do not pause.
        are_states_served: Whether trainings read kept hidden states; see `History`.
    """

    def __init__(
        self,
        space: SearchSpace,
        backbone: Backbone,
        sampler: str | BaseSampler,
        *,
        objectives: Sequence[Objective],
        axes: Sequence[Axis],
        view: Callable[[], Study],
        seed: int = 0,
        constraints: Sequence[Constraint] = (),
        baselines: bool = True,
        trials: int | None = None,
        forecast: Callable[[Sequence[TrialRecord]], Forecast] | None = None,
        are_states_served: Callable[[int], bool] = nothing_is_served,
    ) -> None:
        self._space = space
        self._backbone = backbone
        self._sampler = sampler
        self._objectives = objectives
        self._axes = axes
        self._view = view
        self._seed = seed
        self._constraints = constraints
        self._baselines = space.baselines(backbone, trials) if baselines else ()
        self._forecast = forecast
        self._are_states_served = are_states_served

    @section("ask")
    def propose(
        self, number: int, records: Sequence[TrialRecord], pending: Sequence[Configuration] = ()
    ) -> Proposal:
        """Return what a trial is to try: the next baseline that was not tried, or what the sampler chooses.

        Args:
            number: The trial's number.
            records: Every finished and paused trial.
            pending: What is being trained for the first time.
        """
        tried = {record.baseline for record in records}
        for baseline in self._baselines:
            if baseline.name not in tried and baseline.configuration not in pending:
                return self._encoded(baseline.configuration, baseline.name)
        sampler = make_sampler(self._sampler, self._seed, number)
        if isinstance(sampler, EhviSampler):
            history = self._history(records, pending)
            return self._encoded(sampler.choose(number, self._space, self._backbone, history))
        study = self._view()
        study.sampler = sampler
        trial = study.ask()
        configuration = self._space.suggest(trial, self._backbone)
        (frozen,) = (known for known in study.get_trials(deepcopy=False) if known.number == trial.number)
        return Proposal(
            configuration=configuration,
            parameters=trial.params,
            distributions=trial.distributions,
            attributes=frozen.system_attrs,
        )

    def _encoded(self, configuration: Configuration, baseline: str | None = None) -> Proposal:
        parameters, distributions = encoded(self._space, configuration, self._backbone)
        return Proposal(
            configuration=configuration,
            parameters=parameters,
            distributions=distributions,
            baseline=baseline,
        )

    def _history(self, records: Sequence[TrialRecord], pending: Sequence[Configuration]) -> History:
        """Return every trial with the values known of it; a failed training has the worst of the metrics."""
        forecast = None if self._forecast is None else self._forecast(records)
        worst = {axis.objective.name: axis.worst for axis in self._axes if not axis.objective.before_training}
        names = [objective.name for objective in self._objectives]
        evaluations = [record.evaluation for record in records if record.duplicate_of is None]
        trials: list[tuple[Configuration, Mapping[str, float]]] = []
        for evaluation in evaluations:
            values = dict(evaluation.values)
            if evaluation.status == "failed":
                values |= worst
            elif evaluation.status == "paused" and forecast is not None:
                values |= dict(zip(names, forecast.values(evaluation), strict=True))
            trials.append((evaluation.configuration, values))
        members = [record.evaluation for record in front_records(records, self._objectives)]
        shares = contributions([member.values for member in members], self._axes)
        return History(
            trials=[*trials, *((configuration, {}) for configuration in pending)],
            axes=self._axes,
            front={member.configuration: share for member, share in zip(members, shares, strict=True)},
            constraints=self._constraints,
            trainings=[*(evaluation.trainings for evaluation in evaluations), *(1 for _ in pending)],
            are_states_served=self._are_states_served,
        )
