"""What is tried next: an anchor, what the elastic adapter or the space proposes, or what Optuna asks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from optuna.trial import Trial, TrialState

from autopeft.configuration import Configuration
from autopeft.gathered_trial import GatheredTrial
from autopeft.history import history_of
from autopeft.pareto import Axis, contributions
from autopeft.profiling import section

if TYPE_CHECKING:
    from autopeft.elastic_proposals import ElasticProposals
    from autopeft.front import ParetoFront
    from autopeft.search import Search
    from autopeft.study_store import StudyStore

_ANCHOR: Final = "autopeft:anchor"


@dataclass(frozen=True)
class Asked:
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
    def anchor(self) -> str | None:
        """The name of the reference point that it tries; None where it tries another."""
        name: str | None = self.trial.user_attrs.get(_ANCHOR)
        return name


class Asker:
    """Asks for trials; the same records and the same number give the same configuration.

    Args:
        search: Gives space, seed and constraints.
        store: The study.
        elastic: The elastic adapter's proposals; None without one.
        axes: The search's.
    """

    def __init__(
        self, search: Search, store: StudyStore, elastic: ElasticProposals | None, axes: Sequence[Axis]
    ) -> None:
        self._search = search
        self._store = store
        self._elastic = elastic
        self._axes = axes

    def enqueue_anchors(self) -> None:
        """Let the space's reference points that were not tried yet come first."""
        search = self._search
        tried = {record.anchor for record in self._store.records}
        for anchor in search.space.anchors(search.backbone):
            if anchor.name not in tried:
                self._store.live.enqueue_trial(
                    search.space.encode(anchor.configuration, search.backbone),
                    user_attrs={_ANCHOR: anchor.name},
                )

    @section("ask")
    def ask(self, front: ParetoFront, count: int) -> list[Asked]:
        """Begin trials in the live study.

        Args:
            front: The front so far.
            count: How many. Those that are trained together are asked for one after the other, each as if
                those before it had been tried and had told nothing.
        """
        asked: list[Asked] = []
        for _ in range(count):
            self._propose(front, [one.configuration for one in asked])
            trial = GatheredTrial.of(self._store.live.ask())
            configuration = self._search.space.suggest(trial, self._search.backbone)
            if isinstance(trial, GatheredTrial):
                trial.write()
            asked.append(Asked(trial, configuration))
        return asked

    def _propose(self, front: ParetoFront, pending: Sequence[Configuration]) -> None:
        """Let the space say what the next trial tries, unless an anchor is waiting."""
        live, search, records = self._store.live, self._search, self._store.records
        if live.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return
        number = len(live.get_trials(deepcopy=False))
        if self._elastic is not None:
            points = {point.configuration: point.values for point in front}
            proposed = self._elastic.propose(number, records, points, pending)
            if proposed is not None:
                live.enqueue_trial(proposed)
                return
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
            is_prefix_served=search.training.frozen_prefix == "cached" and search.pack_size == 1,
            pending=pending,
        )
        generator = random.Random(f"{search.seed}:{number}")
        proposal = search.space.propose(number, parents, generator, search.backbone, history)
        if proposal is not None:
            live.enqueue_trial(dict(proposal))
