"""What is tried next: a baseline, what the space proposes, or what Optuna asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from optuna.trial import Trial, TrialState

from autopeft.core.configuration import Configuration
from autopeft.core.pareto import Axis, contributions
from autopeft.core.profiling import section
from autopeft.optimization.gathered_trial import GatheredTrial
from autopeft.optimization.history import history_of

if TYPE_CHECKING:
    from autopeft.optimization.study_store import StudyStore
    from autopeft.reporting.front import ParetoFront
    from autopeft.search import Search

_BASELINE: Final = "autopeft:baseline"


@dataclass(frozen=True)
class Proposal:
    """A trial of the live study that is to be trained.

    Attributes:
        trial: Optuna's.
        configuration: What it tries.
    """

    trial: Trial
    configuration: Configuration

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def baseline(self) -> str | None:
        """The name of the reference point that it tries; None where it tries another."""
        name: str | None = self.trial.user_attrs.get(_BASELINE)
        return name


class Proposer:
    """Asks for trials; the same records and the same number give the same configuration.

    Args:
        search: Gives space, seed and constraints.
        store: The study.
        axes: The search's.
    """

    def __init__(self, search: Search, store: StudyStore, axes: Sequence[Axis]) -> None:
        self._search = search
        self._store = store
        self._axes = axes

    def enqueue_baselines(self) -> None:
        """Let the space's reference points that were not tried yet come first."""
        search = self._search
        tried = {record.baseline for record in self._store.records}
        for baseline in search.space.baselines(search.backbone):
            if baseline.name not in tried:
                self._store.live.enqueue_trial(
                    search.space.encode(baseline.configuration, search.backbone),
                    user_attrs={_BASELINE: baseline.name},
                )

    @section("ask")
    def ask(self, front: ParetoFront, count: int) -> list[Proposal]:
        """Begin trials in the live study.

        Args:
            front: The front so far.
            count: How many. Those that are trained together are asked for one after the other, each as if
                those before it had been tried and had told nothing.
        """
        asked: list[Proposal] = []
        for _ in range(count):
            self._propose(front, [one.configuration for one in asked])
            trial = GatheredTrial.of(self._store.live.ask())
            configuration = self._search.space.suggest(trial, self._search.backbone)
            if isinstance(trial, GatheredTrial):
                trial.write()
            asked.append(Proposal(trial, configuration))
        return asked

    def _propose(self, front: ParetoFront, pending: Sequence[Configuration]) -> None:
        """Let the space say what the next trial tries, unless a baseline is waiting."""
        live, search, records = self._store.live, self._search, self._store.records
        if live.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return
        number = len(live.get_trials(deepcopy=False))
        if not search.space.proposes(number):  # what each point adds to the hypervolume is work
            return
        shares = contributions([point.values for point in front], self._axes)
        parents = {point.configuration: share for point, share in zip(front, shares, strict=True)}
        promotion = self._store.promotion
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
        proposal = search.space.propose(number, parents, generator, search.backbone, history)
        if proposal is not None:
            live.enqueue_trial(dict(proposal))
