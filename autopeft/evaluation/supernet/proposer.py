"""The elastic adapter in a search: inference on untrained configurations decides what is tried next.

It is the cheapest fidelity there is, and may be wrong. So its ranking is compared with every training of a
sub-configuration as the search goes on, and while it is poor the elastic adapter proposes nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.pareto import Axis, Values, hypervolume
from autopeft.evaluation.supernet.candidates import crossed
from autopeft.evaluation.supernet.ranking_check import ElasticCheck, check_elastic
from autopeft.evaluation.supernet.settings import GENERATIONS
from autopeft.evaluation.supernet.supernet import SubScore
from autopeft.evaluation.supernet.warm_start import ElasticWeights, write_json
from autopeft.methods import count_parameters
from autopeft.search_spaces.base import (
    middle_learning_rate,
    readable_learning_rate,
    summed_learning_rate,
)

if TYPE_CHECKING:
    from autopeft.reporting.mlflow.tracker import Tracker

_SHORTLIST = 12
_FEWEST_FOR_A_LINE = 3
_RATE_SPREAD = 0.4  # of the logarithm: a factor of 1.5


class ElasticProposals:
    """Proposes trials by the scores of an elastic adapter; kept in a folder, so that a search resumes.

    Args:
        weights: The elastic adapter, and the search's settings for it.
        axes: The search's axes of the hypervolume.

    Attributes:
        weights: The same.
    """

    def __init__(self, weights: ElasticWeights, axes: Sequence[Axis]) -> None:
        self.weights = weights
        self.settings = weights.settings
        self.evaluator = weights.evaluator
        self.space = weights.space
        self.axes = tuple(axes)
        self._scores: dict[Configuration, SubScore] = {}
        self._scoring_cost = Cost()
        self._pool: list[Configuration] = []
        self._costs: dict[Configuration, dict[str, float]] = {}
        self._load()

    @property
    def cost(self) -> Cost:
        """Compute of all elastic trainings and of all scoring so far."""
        return self.weights.cost + self._scoring_cost

    def propose(
        self,
        number: int,
        records: Sequence[TrialRecord],
        front: Mapping[Configuration, Values],
        pending: Sequence[Configuration] = (),
    ) -> dict[str, Any] | None:
        """Return the parameters of the trial that promises most, or None where another is to decide.

        Args:
            number: The trial's number; with the evaluator's seed the only source of chance.
            records: All finished trials.
            front: Configurations of the front with their values.
            pending: What is about to be trained.
        """
        generator = random.Random(f"elastic:{self.evaluator.seed}:{number}")
        if generator.random() >= self.settings.share or self.weights.adapter() is None:
            return None
        check = self.check(records)
        if check is None or not check.trusted:
            return None
        self._fill_pool()
        tried = {_bare(one) for one in (*pending, *(record.evaluation.configuration for record in records))}
        left = [one for one in self._pool if one not in tried]
        best = self._most_promising(left, records, list(front.values()))
        if best is None:
            return None
        chosen = best.replace(learning_rate=self._rate(best, front, generator))
        return self.space.encode(chosen, self.evaluator.backbone)

    def check(self, records: Sequence[TrialRecord]) -> ElasticCheck | None:
        """Compare the scores with what was trained; None where there is no elastic adapter yet.

        Where trials begin from its weights, only those are compared: reference points, which do not, differ
        from them by more than what the scores are of.
        """
        adapter = self.weights.trained
        if adapter is None:
            return None
        trained = [
            one.evaluation
            for one in self._comparable(records)
            if adapter.obstacle(one.evaluation.configuration) is None
        ]
        self._score([_bare(one.configuration) for one in trained])
        monitor = self.evaluator.monitor
        return check_elastic(
            monitor,
            scores=[-self._scores[_bare(one.configuration)].loss for one in trained],
            trained=[one.values[monitor] for one in trained],
            parameters=[one.values["trainable_parameters"] for one in trained],
            warm_start=self.settings.warm_start,
            lowest=self.settings.lowest_correlation,
        )

    def _comparable(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Return the whole trainings that began as the search's sampled trials do."""
        return [
            one
            for one in records
            if one.evaluation.status == "complete"
            and one.duplicate_of is None
            and one.evaluation.warm_start == self.settings.warm_start
        ]

    def report(
        self, records: Sequence[TrialRecord], say: Callable[[str], object], tracker: Tracker | None
    ) -> None:
        """Say how well the elastic adapter ranked the trials, and keep the figures with the search's run."""
        if self.weights.obstacle is not None:
            say(f"There was no elastic adapter: {self.weights.obstacle}.")
        check = self.check(records) if self.settings.share else None  # else nobody has asked for scores
        if check is not None:
            say(check.describe())
            if tracker is not None:
                tracker.log_report(check.save, "elastic")

    def _fill_pool(self) -> None:
        """Score what is proposed from where that was not done."""
        adapter = self.weights.trained
        if self._pool or adapter is None:
            return
        generator = self.weights.generator()
        points = self.weights.draws(generator)
        self._evolve([one for one in points if adapter.obstacle(one) is None], generator)
        self._save()

    def _evolve(self, points: Sequence[Configuration], generator: random.Random) -> None:
        """Score draws, then crossings of those that promise most (Cai et al., "Once-for-All", 2020)."""
        pool = dict.fromkeys(map(_bare, points))
        self._score(list(pool))
        while len(pool) < self.settings.candidates:
            parents = self._promising(list(pool))
            wanted = min(self.settings.candidates - len(pool), self.settings.candidates // GENERATIONS)
            children = crossed(self.space, self.evaluator.backbone, parents, pool, wanted, generator)
            if not children:
                break
            self._score(children)
            pool |= dict.fromkeys(children)
        self._pool = list(pool)

    def _promising(self, pool: Sequence[Configuration]) -> list[Configuration]:
        """Return the first layers of non-dominated sorting by score, parameters and lowest block.

        Memory follows the lowest block, and would take a second a configuration to count.
        """
        left = list(pool)
        kept: list[Configuration] = []
        while left and len(kept) < _SHORTLIST:
            lines = np.array([self._line(one) for one in left])
            beats = (lines[:, None] <= lines[None]).all(2) & (lines[:, None] < lines[None]).any(2)
            best = [not beaten for beaten in np.any(beats, axis=0).tolist()]
            kept += [one for one, flag in zip(left, best, strict=True) if flag]
            left = [one for one, flag in zip(left, best, strict=True) if not flag]
        return kept

    def _line(self, one: Configuration) -> tuple[float, float, float]:
        """Return what is to be small of a configuration."""
        parameters = float(count_parameters(self.evaluator.backbone, one))
        lowest = math.inf if one.lowest_block is None else one.lowest_block
        return self._scores[one].loss, parameters, -float(lowest)

    def _most_promising(
        self, left: Sequence[Configuration], records: Sequence[TrialRecord], front: Sequence[Values]
    ) -> Configuration | None:
        """Return what is expected to add most to the hypervolume; None where nothing adds."""
        shortlist = self._promising(left)[: 2 * _SHORTLIST]
        expected = self._expected(shortlist, records)
        before = hypervolume(front, self.axes)
        best, most = None, 0.0
        for one, metric in zip(shortlist, expected, strict=True):
            values = {**self._costs_of(one), self.evaluator.monitor: metric}
            gain = hypervolume([*front, values], self.axes) - before
            if gain > most:
                best, most = one, gain
        return best

    def _expected(self, chosen: Sequence[Configuration], records: Sequence[TrialRecord]) -> list[float]:
        """Return the metric a training may give: a line through what was trained, by the loss.

        What trainings differ from the line by (one standard deviation) is added: else a line, which is flat
        where little is known, would never expect more than what there is.
        """
        monitor = self.evaluator.monitor
        known = [
            (self._scores[bare].loss, one.evaluation.values[monitor])
            for one in self._comparable(records)
            if (bare := _bare(one.evaluation.configuration)) in self._scores
        ]
        losses = np.array([loss for loss, _ in known])
        metrics = np.array([metric for _, metric in known])
        if len(known) < _FEWEST_FOR_A_LINE or losses.std() == 0:
            return [self._scores[one].metrics[monitor] for one in chosen]
        slope, level = np.polyfit(losses, metrics, 1)
        spread = float(np.std(metrics - level - slope * losses))
        return [float(level + slope * self._scores[one].loss) + spread for one in chosen]

    def _costs_of(self, one: Configuration) -> dict[str, float]:
        if one not in self._costs:
            needed = {axis.objective.name for axis in self.axes} - set(self.evaluator.task.metrics)
            exact = {"trainable_parameters": float(count_parameters(self.evaluator.backbone, one))}
            self._costs[one] = exact if needed <= exact.keys() else self.evaluator.costs(one)
        return {**self._costs[one], **self._scores[one].metrics}

    def _rate(
        self, chosen: Configuration, front: Mapping[Configuration, Values], generator: random.Random
    ) -> float:
        """Return a learning rate with a sum near that of a front's member: inference says nothing of it."""
        rate = self.space.learning_rate
        if isinstance(rate, float):
            return rate
        adapted = [summed_learning_rate(one) for one in front if len(one)]
        near = generator.choice(adapted) / max(1, len(chosen)) if adapted else middle_learning_rate(rate)
        return readable_learning_rate(near * math.exp(generator.gauss(0, _RATE_SPREAD)), *rate)

    def _score(self, configurations: Sequence[Configuration]) -> None:
        unknown = [one for one in dict.fromkeys(configurations) if one not in self._scores]
        if not unknown:
            return
        assert self.weights.trained is not None
        scoring = self.weights.trained.score(self.evaluator, unknown)
        self._scores |= dict(zip(unknown, scoring.scores, strict=True))
        self._scoring_cost += scoring.cost
        self._save()

    @property
    def _path(self) -> Path:
        return self.weights.folder / "scores.json"

    def _save(self) -> None:
        """Write scores, pool and cost."""
        order = list(self._scores)
        places = {one: index for index, one in enumerate(order)}
        data = {
            "cost": asdict(self._scoring_cost),
            "scores": [{"configuration": one.to_dict(), **asdict(self._scores[one])} for one in order],
            "pool": [places[one] for one in self._pool],
        }
        write_json(self._path, data)

    def _load(self) -> None:
        if self.weights.trained is None or not self._path.is_file():
            return
        data = json.loads(self._path.read_text())
        self._scoring_cost = Cost(**data["cost"])
        order = [Configuration.from_dict(one["configuration"]) for one in data["scores"]]
        for one, entry in zip(order, data["scores"], strict=True):
            self._scores[one] = SubScore(loss=entry["loss"], metrics=entry["metrics"])
        self._pool = [order[index] for index in data["pool"]]


def _bare(configuration: Configuration) -> Configuration:
    """Return a configuration as far as inference tells it from others: without how it is trained."""
    return Configuration(configuration.adapters)
