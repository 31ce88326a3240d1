"""The verdict on a search: a uniform LoRA sweep beside it, and both fronts trained again and tested."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np

from autopeft.core.configuration import Configuration
from autopeft.core.durable_files import load_json, save_json
from autopeft.core.errors import NoCandidateError, check_numbers, check_whole
from autopeft.core.evaluation import Cost, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.pareto import thinned
from autopeft.core.seeding import training_seed
from autopeft.evaluation.derived import measured_cut
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.resampled_test import DRAWS, resampled_test
from autopeft.evaluation.warm_start import WarmStarts, initial_weights
from autopeft.methods import FullFineTuning
from autopeft.models.backbone import Backbone
from autopeft.models.loading import LoadOptions
from autopeft.opened_search import OpenSearch
from autopeft.optimization.trial_records import Spent
from autopeft.reporting.console import SearchProgress
from autopeft.reporting.front import FrontPoint, ParetoFront
from autopeft.reporting.verdict import FinalPoint, Verdict, compare, joint_axes, state_of
from autopeft.search_identity import SearchSettings, alters_trials, held_study
from autopeft.search_spaces import Uniform
from autopeft.search_spaces.learning_rates import full_learning_rate
from autopeft.search_spaces.uniform import PLACES

_logger = logging.getLogger(__name__)
SEEDS = 3
"""Fresh trainings of each point; of fewer, an interval says little."""
_FINALISTS = 5
_FRESH = 1000  # trainings beyond those that any trial has in a search
_FULL = 0  # in the place of a trial's number
_FULL_RATES = (1, 1 / 3, 3)  # of full fine-tuning, as multiples of the usual one
_ENOUGH_TRAININGS = 3  # to say what one takes
_SWEPT = Uniform(places=tuple(PLACES))
_HEAD = "head alone"  # key of its record, where the search has none


class Sweep(Protocol):
    """A search, as far as a verdict runs one."""

    interrupted: bool

    @property
    def run(self) -> Callable[..., ParetoFront]:
        """Search until a budget is spent; see `Search.run`."""


def reach_verdict(
    search: SearchSettings,
    front: ParetoFront,
    opened: OpenSearch,
    make_sweep: Callable[..., Sweep],
    share: float,
    *,
    seeds: int = SEEDS,
    full_fine_tuning: bool = False,
    progress: bool = True,
    covers_tests: bool = False,
) -> Verdict:
    """Return the verdict on a search, and keep it with its study and in MLflow; see `Search.verdict`.

    Args:
        search: What the verdict is on.
        front: Its front.
        opened: It, opened.
        make_sweep: Makes a search, of `Search`'s arguments.
        share: Compute of the sweep, as a share of what the search took.
        seeds: Fresh trainings of each point.
        full_fine_tuning: Whether every weight is trained as well, to be named beside the fronts.
        progress: Whether to print.
        covers_tests: Whether the share is for the tests too, which then get half of it at most.
    """
    check_numbers(above=0, share=share)
    check_whole("seeds", seeds, what="a number of trainings", least=SEEDS)
    said = SearchProgress(enabled=progress)
    front.best()  # raises where it is empty
    warm_starts = opened.warm_starts(search.warm_start, search.folder, trains=False)
    spent = Spent.of(front.records).cost + (Cost() if warm_starts is None else warm_starts.cost)
    device = "gpu_seconds" if spent.gpu_seconds else "cpu_seconds"
    seconds, for_tests = share * getattr(spent, device), getattr(expected_tests(front, seeds), device)
    if covers_tests:
        seconds -= min(for_tests, seconds / 2)
    about = f" in about {for_tests:.0f} {device}" if for_tests else ""
    whole = f", and {len(_FULL_RATES) + seeds - 1} trainings have all weights" if full_fine_tuning else ""
    said.say(f"A uniform LoRA sweep takes {seconds:.0f} {device}; then both fronts are tested{about}{whole}.")
    sweep = make_sweep(**search.arguments() | sweep_settings(search, opened.backbone))
    swept = _swept(sweep, **{device: seconds})
    tests = FinalTests(
        opened.evaluator, warm_starts, search.folder / "final_tests.json", search.seed, seeds, said.say
    )
    taken = 0.0 if swept is None else getattr(Spent.of(swept.records).cost, device) / getattr(spent, device)
    found = _compared(front, swept, tests, opened.space.point(place=1.0), taken)
    _keep(search, front, found, said)
    if full_fine_tuning:
        found = replace(found, full=tests.of_full_fine_tuning())
        _keep(search, front, found, said)
    return found


def _keep(search: SearchSettings, front: ParetoFront, found: Verdict, said: SearchProgress) -> None:
    """Say a verdict, and keep it with the study and in MLflow."""
    front.verdict = str(found)
    said.say(str(found))
    with closing(held_study(search)) as study:
        study.set_attribute("verdict", {"state": state_of(front.records), "text": str(found)})
        if isinstance(search.tracking, str):
            from autopeft.reporting.mlflow.store import note_verdict

            page = front.to_html()
            try:
                note_verdict(search.tracking, search.experiment, study.study_id, str(found), page=page)
            except ValueError as error:  # the study has it: MLflow never fails a search
                _logger.warning("The verdict is not in MLflow: %s", error)


def sweep_settings(settings: SearchSettings, backbone: Backbone) -> dict[str, Any]:
    """Return what a uniform LoRA sweep has otherwise than the search beside which it stands."""
    rate = settings.space.learning_rate
    return {
        "backbone": backbone,
        **vars(LoadOptions()),  # it is loaded
        "space": _SWEPT if isinstance(rate, float) else replace(_SWEPT, learning_rate=rate),
        "sampler": "tpe",
        "name": "sweep",
        "folder": settings.folder,
        "seeds": 1,
        "prior": (),
        "baselines": True,
        "executor": "local" if alters_trials(settings.executor) else settings.executor,
        **dict.fromkeys(("halving", "tracking"), None),
        **dict.fromkeys(("derive", "score_check", "warm_start"), False),
    }


def _swept(sweep: Sweep, **budget: Any) -> ParetoFront | None:
    """Return a sweep's front; None where no uniform LoRA keeps the constraints, or none could be trained.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the sweep.
    """
    try:
        front = sweep.run(progress=False, **budget)
    except NoCandidateError:
        return None
    if sweep.interrupted:
        raise KeyboardInterrupt
    return front if len(front) else None


def expected_tests(front: ParetoFront, seeds: int) -> Cost:
    """Return what testing a front and a sweep's takes, by a search's whole trainings; nothing for so few."""
    whole = [
        record.evaluation
        for record in front.records
        if record.evaluation.status == "complete"
        and (record.duplicate_of, record.derived_from) == (None, None)
    ]
    trainings = sum(evaluation.trainings for evaluation in whole)
    if trainings < _ENOUGH_TRAININGS:
        return Cost()
    points = len({point.record.trained for point in finalists(front)}) + _FINALISTS + 1
    return Cost.total([evaluation.cost for evaluation in whole]).times(points * seeds / trainings)


@dataclass
class FinalTests:
    """Trains points again with fresh seeds and tests them; what is done is kept in a file."""

    evaluator: Evaluator
    warm_starts: WarmStarts | None
    path: Path
    seed: int
    seeds: int  # trainings of each point
    say: Callable[[str], None]  # a line for each training
    known: dict[str, Any] = field(init=False)  # what the file has

    def __post_init__(self) -> None:
        self.known = load_json(self.path) or {}

    def of(self, front: ParetoFront, points: Sequence[FrontPoint], whose: str) -> list[FinalPoint]:
        """Return points of a front with their tests.

        Cuts of a trial are cut from its fresh trainings. What fails counts as the trivial score.
        """
        found: dict[int, list[list[float]]] = {point.number: [] for point in points}
        for place in range(self.seeds):
            for number in dict.fromkeys(point.record.trained for point in points):
                trial = front.trial(number).record
                own = [point for point in points if point.record.trained == number]
                seed = training_seed(self.seed, number, _FRESH + place)
                key = f"{trial.evaluation.configuration.key} {seed} {trial.evaluation.initialised_from}"
                keys = {point.number: f"{key} {point.configuration.key}" for point in own}
                if not self.known.keys() >= {*keys.values()}:
                    tests = self._tests(trial, own, seed, place)
                    self._keep({keys[name]: values for name, values in tests.items()})
                    scores = ", ".join(self.metric.format(values[0]) for values in tests.values())
                    which = f"fresh training {place + 1} of {self.seeds}"
                    self.say(
                        f"{whose.format(number)}, {which}: {self.metric.name} {scores} on the test split"
                    )
                for name, kept in keys.items():
                    found[name].append(self.known[kept])
        costs = [objective.name for objective in front.objectives if not objective.is_metric]
        return [
            FinalPoint(
                costs={name: point.values[name] for name in costs}, tests=np.array(found[point.number])
            )
            for point in points
        ]

    @property
    def metric(self) -> Objective:
        """What is tested."""
        return self.evaluator.monitor

    def head_alone(self, front: ParetoFront, configuration: Configuration) -> ParetoFront:
        """Return a front's trial of the head alone, by itself; trained as `configuration` where it has none.

        Raises:
            RuntimeError: It cannot be trained.
        """
        tried = (
            record
            for record in front.records
            if not len(record.evaluation.configuration) and record.evaluation.status == "complete"
        )
        record = next(tried, None)
        if record is None:
            if _HEAD not in self.known:
                evaluation = self.evaluator.evaluate(configuration)
                if evaluation.status != "complete":
                    raise RuntimeError(f"The head alone could not be trained: {evaluation.reason}.")
                self._keep({_HEAD: TrialRecord(number=-1, evaluation=evaluation).to_dict()})
            record = TrialRecord.from_dict(self.known[_HEAD])
        return ParetoFront([record], front.objectives, front.axes)

    def of_full_fine_tuning(self) -> str:
        """Return what training every weight reaches on the test split, at the best of three rates, in words.

        The rate is chosen by the first seed, on the validation split.
        """
        first, *others = (training_seed(self.seed, _FULL, _FRESH + place) for place in range(self.seeds))
        usual = full_learning_rate(self.evaluator.backbone.hidden_size)
        rates = [float(f"{usual * factor:.2g}") for factor in _FULL_RATES]
        tried = {rate: self._full_training(rate, first) for rate in rates}
        done = {rate: training for rate, training in tried.items() if "reason" not in training}
        if not done:
            return f"full fine-tuning failed: {tried[rates[0]]['reason']}"
        best = max(done, key=lambda rate: self.metric.sign * done[rate]["validation"])
        trainings = [done[best], *(self._full_training(best, seed) for seed in others)]
        worst = self.evaluator.task.trivial_score(self.metric.name, self.evaluator.data)
        tests = [training.get("test", worst) for training in trainings]
        return f"{self.metric.name} {self.metric.format(mean(tests))} of full fine-tuning at rate {best:.2g}"

    def _full_training(self, rate: float, seed: int) -> dict[str, Any]:
        """Return the metric after a training of all weights, or why it failed, which another call may not."""
        key, evaluator, name = f"full fine-tuning {rate:.2g} {seed}", self.evaluator, self.metric.name
        if key not in self.known:
            configuration = Configuration(learning_rate=rate)
            # The constraints are for adapters.
            trained = evaluator.train(configuration, seed, attachment=FullFineTuning, is_trial=False)
            if trained.state is None:
                return {"reason": trained.evaluation.reason}
            test = evaluator.test(configuration, trained.state, attachment=FullFineTuning)[name]
            self._keep({key: {"validation": trained.evaluation.values[name], "test": test}})
            self.say(
                f"Full fine-tuning at rate {rate:.2g}: {name} {self.metric.format(test)} on the test split"
            )
        return dict(self.known[key])

    def _keep(self, found: dict[str, Any]) -> None:
        self.known.update(found)
        save_json(self.path, self.known)

    def _tests(
        self, trial: TrialRecord, points: Sequence[FrontPoint], seed: int, place: int
    ) -> dict[int, list[float]]:
        evaluator, evaluation = self.evaluator, trial.evaluation
        worst = evaluator.task.trivial_score(self.metric.name, evaluator.data)
        weights = initial_weights(self.warm_starts, evaluation, place)
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


def _compared(
    front: ParetoFront, swept: ParetoFront | None, tests: FinalTests, head: Configuration, share: float
) -> Verdict:
    """Return the verdict on a search's front beside a sweep's, to which the head alone is added."""
    metric, backbone = tests.metric, tests.evaluator.backbone
    heads = tests.head_alone(front, head)
    name = "the head alone" if backbone.head else "the untrained model"
    search = tests.of(front, finalists(front), "Trial {} of the search")
    uniform = [] if swept is None else tests.of(swept, finalists(swept), "Trial {} of the sweep")
    alone = tests.of(heads, heads, name.capitalize())
    take = name
    best = heads[0] if swept is None else swept.best()
    if metric.is_better(best.values[metric.name], heads[0].values[metric.name]):
        where = _SWEPT.name_of(best.configuration, backbone)
        take = f"{where} at rate {best.configuration.learning_rate:.2g}, the sweep's {best}"
    return compare(
        search,
        [*uniform, *alone],
        front.axes if swept is None else joint_axes(front.axes, swept.axes),
        metric,
        head=f"{metric.name} {metric.format(float(alone[0].tests[:, 0].mean()))} of {name}",
        share=share,
        take=take,
    )


def finalists(front: ParetoFront) -> list[FrontPoint]:
    """Return the points of a front without which most of its hypervolume would be lost."""
    return [front[index] for index in thinned([point.values for point in front], front.axes, _FINALISTS)]
