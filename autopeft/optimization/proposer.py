"""What is tried next: a baseline, what the space proposes, or what Optuna asks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.distributions import BaseDistribution

from autopeft.core.configuration import Configuration
from autopeft.core.pareto import Axis, contributions
from autopeft.core.profiling import section
from autopeft.optimization.history import history_of

if TYPE_CHECKING:
    from autopeft.optimization.study_store import StudyStore
    from autopeft.optimization.successive_halving import AshaPromoter
    from autopeft.reporting.front import ParetoFront
    from autopeft.search import Search


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial that is to be trained.

    Attributes:
        number: Its number.
        configuration: What it tries.
        parameters: The same, as the space's parameters.
        distributions: What the parameters are from.
        attributes: What the sampler noted of it.
        baseline: The name of the baseline that it is; None where it is another configuration.
    """

    number: int
    configuration: Configuration
    parameters: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]
    attributes: Mapping[str, Any]
    baseline: str | None = None


class Proposer:
    """Asks for trials; the same records and the same number give the same configuration.

    Args:
        search: Gives space, sampler, seed and constraints.
        store: The study.
        axes: The search's.
        promotion: Says what paused trials are expected to reach; None where trials do not pause.
    """

    def __init__(
        self, search: Search, store: StudyStore, axes: Sequence[Axis], promotion: AshaPromoter | None
    ) -> None:
        self._search = search
        self._store = store
        self._axes = axes
        self._promotion = promotion

    @section("ask")
    def ask(self, front: ParetoFront, count: int) -> list[Proposal]:
        """Return new trials.

        Args:
            front: The front so far.
            count: How many. Those that are trained together are asked for one after the other, each as if
                those before it were being trained.
        """
        asked: list[Proposal] = []
        for _ in range(count):
            asked.append(self._next(front, asked))
        return asked

    def _next(self, front: ParetoFront, asked: Sequence[Proposal]) -> Proposal:
        search = self._search
        number = len(self._store.records) + len(asked)
        tried = {record.baseline for record in self._store.records} | {trial.baseline for trial in asked}
        baselines = search.space.baselines(search.backbone) if search.baselines else ()
        for baseline in baselines:
            if baseline.name not in tried:
                encoded = search.space.encode(baseline.configuration, search.backbone)
                return self._asked(number, asked, encoded, baseline.name)
        proposed = self._proposed(number, front, [trial.configuration for trial in asked])
        return self._asked(number, asked, proposed, None)

    def _asked(
        self,
        number: int,
        asked: Sequence[Proposal],
        fixed: Mapping[str, Any] | None,
        baseline: str | None,
    ) -> Proposal:
        """Ask the sampler for the parameters that are not fixed."""
        expected = None
        if self._promotion is not None:
            expected = self._promotion.forecast(self._store.records).values
        study = self._store.sampler_view(self._search.sampler, expected=expected, running=asked)
        if fixed is not None:
            study.enqueue_trial(dict(fixed))
        trial = study.ask()
        configuration = self._search.space.suggest(trial, self._search.backbone)
        return Proposal(
            number=number,
            configuration=configuration,
            parameters=trial.params,
            distributions=trial.distributions,
            attributes=study.get_trials(deepcopy=False)[trial.number].system_attrs,
            baseline=baseline,
        )

    def _proposed(
        self, number: int, front: ParetoFront, pending: Sequence[Configuration]
    ) -> Mapping[str, Any] | None:
        """Return what the space says that a trial tries; None where it leaves that to the sampler."""
        search, records = self._search, self._store.records
        if not search.space.proposes(number):  # what each point adds to the hypervolume is work
            return None
        shares = contributions([point.values for point in front], self._axes)
        parents = {point.configuration: share for point, share in zip(front, shares, strict=True)}
        promotion = self._promotion
        history = history_of(
            records,
            search.objectives,
            self._axes,
            search.constraints,
            forecast=None if promotion is None else promotion.forecast(records),
            # A pack runs the blocks that its candidates share instead of reading what was kept of them.
            is_prefix_served=search.training.frozen_blocks == "cached" and search.pack_size == 1,
            pending=pending,
        )
        generator = random.Random(f"{search.seed}:{number}")
        return search.space.propose(number, parents, generator, search.backbone, history)
