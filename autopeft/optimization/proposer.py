"""What is tried next: a baseline, or what the sampler chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from optuna.samplers import BaseSampler
from optuna.study import Study, create_study

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Constraint, Objective
from autopeft.core.pareto import Axis, contributions, front_records
from autopeft.core.profiling import section
from autopeft.models.backbone import Backbone
from autopeft.optimization.ehvi_sampler import encoded
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.optimization.proposal import History, Proposal, Sampler
from autopeft.optimization.samplers import make_sampler, reads_study
from autopeft.optimization.study_store import quiet_optuna
from autopeft.optimization.trial_records import TrialRecords
from autopeft.search_spaces import Baseline, SearchSpace
from autopeft.search_spaces.base import FEWEST_BASELINES
from autopeft.search_spaces.prior import Prior

_EARLIER_SHARE = 0.1  # so that a prior that is no good costs little more


@dataclass(frozen=True, kw_only=True)
class Proposer:
    """Says what trials try; the same records and the same number give the same configuration."""

    space: SearchSpace
    backbone: Backbone
    sampler: str | Sampler
    objectives: Sequence[Objective]
    axes: Sequence[Axis]  # of the hypervolume
    view: Callable[[], Study]  # a new study with every trial so far, running ones included
    seed: int
    constraints: Sequence[Constraint]
    baselines: Sequence[Baseline]  # what is tried first
    prior: Prior  # has what is tried of earlier fronts
    # What trials that paused are expected to reach; None where trials do not pause:
    forecast: Callable[[Sequence[TrialRecord]], Forecast] | None
    are_states_served: Callable[[int], bool]  # see `History`

    @section("ask")
    def propose(self, number: int, records: TrialRecords, pending: Sequence[Configuration] = ()) -> Proposal:
        """Return what a trial is to try: the next baseline that was not tried, or what the sampler chooses.

        The records are those of finished and paused trials; what is trained for the first time is pending.
        """
        if (baseline := self._next_baseline(records, pending)) is not None:
            return self._encoded(baseline.configuration, baseline.name)
        sampler = make_sampler(self.sampler, self.seed, number)
        if not isinstance(sampler, BaseSampler):
            history = self._history(records, pending)
            return self._encoded(sampler.choose(number, self.space, self.backbone, history))
        if not reads_study(sampler):  # a study of thousands would be made for each trial
            with quiet_optuna():
                study = create_study()
        else:
            study = self.view()
        study.sampler = sampler
        trial = study.ask()
        configuration = self.space.suggest(trial, self.backbone)
        (frozen,) = (known for known in study.get_trials(deepcopy=False) if known.number == trial.number)
        return Proposal(
            configuration=configuration,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs=frozen.system_attrs,
        )

    def _next_baseline(self, records: TrialRecords, pending: Sequence[Configuration]) -> Baseline | None:
        """Return the next that was not tried: the space's first, what the prior has, the space's others."""
        split, has_earlier = FEWEST_BASELINES, bool(self.prior.baselines)
        first, others, earlier = (
            [
                known
                for known in several
                if known.name not in records.baselines
                and known.configuration not in pending
                and not (has_earlier and records.tried(known.configuration.key))
            ]
            for several in (self.baselines[:split], self.baselines[split:], self.prior.baselines)
        )
        may_try_earlier = not first and earlier and self._may_try_earlier(records, pending)
        return next(iter([*first, *(earlier if may_try_earlier else ()), *others]), None)

    def _may_try_earlier(self, records: TrialRecords, pending: Sequence[Configuration]) -> bool:
        """Whether the prior's trials off the front took at most a tenth of all optimizer steps."""
        names = {baseline.name for baseline in self.prior.baselines}
        if not {baseline.configuration for baseline in self.prior.baselines}.isdisjoint(pending):
            return False
        members = {record.number for record in front_records(records, self.objectives)}
        trained = [record for record in records if record.duplicate_of is None]
        off_front = [
            record for record in trained if record.baseline in names and record.number not in members
        ]
        in_all, in_vain = (
            sum(record.evaluation.cost.steps for record in several) for several in (trained, off_front)
        )
        return in_vain <= _EARLIER_SHARE * in_all

    def _encoded(self, configuration: Configuration, baseline: str | None = None) -> Proposal:
        params, distributions = encoded(self.space, configuration, self.backbone)
        return Proposal(
            configuration=configuration, params=params, distributions=distributions, baseline=baseline
        )

    def _history(self, known: TrialRecords, pending: Sequence[Configuration]) -> History:
        """Return every trial with the values known of it; a failed training has the worst of the metrics."""
        cuts = [point.evaluation.configuration for point in known.front() if point.derived_from is not None]
        records = [_at_end(record) for record in known]
        forecast = None if self.forecast is None else self.forecast(records)
        worst = {axis.objective.name: axis.worst for axis in self.axes if not axis.objective.before_training}
        names = [objective.name for objective in self.objectives]
        evaluations = [record.evaluation for record in records if record.duplicate_of is None]
        trials: list[tuple[Configuration, Mapping[str, float]]] = []
        for evaluation in evaluations:
            values = dict(evaluation.values)
            if evaluation.status == "failed":
                values |= worst
            elif evaluation.status == "paused" and forecast is not None:
                values |= dict(zip(names, forecast.values(evaluation), strict=True))
            trials.append((evaluation.configuration, values))
        members = [record.evaluation for record in front_records(records, self.objectives)]
        shares = contributions([member.values for member in members], self.axes)
        return History(
            trials=[*trials, *((configuration, {}) for configuration in pending)],
            axes=self.axes,
            front={member.configuration: share for member, share in zip(members, shares, strict=True)},
            cuts=cuts,
            constraints=self.constraints,
            trainings=[*(evaluation.trainings for evaluation in evaluations), *(1 for _ in pending)],
            earlier_rates=self.prior.rates,
            are_states_served=self.are_states_served,
        )


def _at_end(record: TrialRecord) -> TrialRecord:
    """Return a trial with the values of what its ranks came to, if they were allocated in training."""
    evaluation = record.evaluation
    if evaluation.configuration.allocation is None:
        return record
    return replace(record, evaluation=replace(evaluation, values=evaluation.values_at_end))
