"""The verdict on a search: a uniform LoRA sweep beside it, and both fronts trained again and tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autopeft.core.durable_files import load_json, save_json
from autopeft.core.evaluation import TrialRecord
from autopeft.core.pareto import thinned
from autopeft.core.seeding import training_seed
from autopeft.evaluation.derived import measured_cut
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.resampled_test import DRAWS, resampled_test
from autopeft.evaluation.warm_start import WarmStarts, initial_weights
from autopeft.models.backbone import Backbone
from autopeft.reporting.front import FrontPoint, ParetoFront
from autopeft.reporting.verdict import FinalPoint, Verdict, compare, joint_axes
from autopeft.search_identity import SearchSettings, alters_trials
from autopeft.search_spaces import Uniform

_FINALISTS = 5
_FRESH = 1000  # trainings beyond those that any trial has in a search


def sweep_settings(settings: SearchSettings, backbone: Backbone) -> dict[str, Any]:
    """Return what a uniform LoRA sweep has otherwise than the search beside which it stands."""
    rate = settings.space.learning_rate
    return {
        "backbone": backbone,
        "space": Uniform() if isinstance(rate, float) else Uniform(learning_rate=rate),
        "sampler": "tpe",
        "name": "uniform",
        "folder": settings.folder,
        "seeds": 1,
        "prior": (),
        "executor": "local" if alters_trials(settings.executor) else settings.executor,
        **dict.fromkeys(("halving", "tracking"), None),
        **dict.fromkeys(("derive", "score_check", "warm_start"), False),
    }


@dataclass(frozen=True)
class FinalTests:
    """Trains points again with fresh seeds and tests them; what is done is kept in a file."""

    evaluator: Evaluator
    warm_starts: WarmStarts | None
    path: Path
    seed: int
    seeds: int  # trainings of each point

    def of(self, front: ParetoFront, points: Sequence[FrontPoint]) -> list[FinalPoint]:
        """Return points of a front with their tests.

        Cuts of a trial are cut from its fresh trainings. What fails counts as the trivial score.
        """
        known = load_json(self.path) or {}
        found: dict[int, list[list[float]]] = {point.number: [] for point in points}
        for place in range(self.seeds):
            for number in dict.fromkeys(point.record.trained for point in points):
                trial = front.trial(number).record
                own = [point for point in points if point.record.trained == number]
                seed = training_seed(self.seed, number, _FRESH + place)
                key = f"{trial.evaluation.configuration.key} {seed}"
                keys = {point.number: f"{key} {point.configuration.key}" for point in own}
                if not known.keys() >= {*keys.values()}:
                    tests = self._tests(trial, own, seed)
                    known |= {keys[name]: values for name, values in tests.items()}
                    save_json(self.path, known)
                for name, kept in keys.items():
                    found[name].append(known[kept])
        costs = [objective.name for objective in front.objectives if not objective.is_metric]
        return [
            FinalPoint(
                costs={name: point.values[name] for name in costs}, tests=np.array(found[point.number])
            )
            for point in points
        ]

    def _tests(self, trial: TrialRecord, points: Sequence[FrontPoint], seed: int) -> dict[int, list[float]]:
        evaluator, evaluation = self.evaluator, trial.evaluation
        worst = evaluator.task.trivial_score(evaluator.monitor.name, evaluator.data)
        weights = initial_weights(self.warm_starts, evaluation)
        trained, tests = evaluator.train(evaluation.configuration, seed, initial_weights=weights), {}
        for point in points:
            outcome = trained
            if trained.state is not None and point.number != trial.number:
                outcome = measured_cut(evaluator, trained, point.configuration)
            tests[point.number] = (
                [worst] * (1 + DRAWS)
                if outcome.state is None
                else resampled_test(evaluator, point.configuration, outcome.state)
            )
        return tests


def reach_verdict(front: ParetoFront, sweep: ParetoFront, tests: FinalTests, share: float) -> Verdict:
    """Return the verdict on a search's front beside a sweep's, to which the head alone is added."""
    metric, best = tests.evaluator.monitor, sweep.best()
    heads = [
        front.trial(record.number)
        for record in front.records
        if not len(record.evaluation.configuration) and record.evaluation.status == "complete"
    ]
    _, adapter = next(iter(best.configuration))
    return compare(
        tests.of(front, finalists(front)),
        [*tests.of(sweep, finalists(sweep)), *tests.of(front, heads[:1])],
        joint_axes(front.axes, sweep.axes),
        metric,
        share=share,
        take=f"{adapter} everywhere at rate {best.configuration.learning_rate:.2g}, the sweep's {best}",
    )


def finalists(front: ParetoFront) -> list[FrontPoint]:
    """Return the points of a front without which most of its hypervolume would be lost."""
    return [front[index] for index in thinned([point.values for point in front], front.axes, _FINALISTS)]
