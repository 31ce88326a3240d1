"""What a search's choices are worth when nothing is trained: many seeds in minutes, to tell details apart.

    python -m benchmarks.simulated_search [--seeds 20] [--budget 48] [--runs FILE]

A forest (Geurts, Ernst and Wehenkel, "Extremely randomized trees", 2006) is fitted to the validation scores
of every configuration of LoRA that runs of `python -m benchmarks.search_cost` trained, those in
`benchmarks/results` unless told otherwise. A simulated training gives what the forest foretells and one of
the errors that it made, out of its bag, where it foretold about the same: the noise of a training and what
the forest does not know. Searches go on until their steps took as much as so many trainings through all
blocks. Members of the front are trained up to three times, rungs are left out, and a configuration that comes
again is trained again. Figures are the
hypervolume of what the forest foretells of the front's members, at a quarter, half and all of the budget:
means over seeds, and the differences from the first row with standard errors, as seeds are shared. What holds
here is a reason to try it and not a result: real trainings have the last word.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, TPESampler
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import ExtraTreesRegressor

from autopeft.core.configuration import Configuration
from autopeft.core.pareto import contributions, hypervolume, non_dominated
from autopeft.evaluation.site_scoring import score_sites
from autopeft.methods import count_parameters
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.expected_improvement import Features
from autopeft.optimization.proposal import History
from autopeft.optimization.seed_replication import replication_delay
from autopeft.search_spaces import SearchSpace
from benchmarks.rivals.comparison import axes_of, read_runs
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import Setting, per_layer
from benchmarks.surrogate import OURS, RUNS, Logs, RateFeatures, final_scores, logs_of

RESULTS = Path(__file__).parent / "results" / "simulated_search.json"
SHARES = (0.25, 0.5, 1.0)
_NEAREST = 40  # scores among whose errors a training's is drawn
_MOST_TRAININGS = 3
Values = Mapping[str, float]


class World:
    """Answers for trainings on one data set.

    Args:
        dataset: Name of the data set.
        logs: Of runs on it.
    """

    def __init__(self, dataset: str, logs: Logs) -> None:
        setting = Setting(dataset=dataset, seed=0, trials=1)
        evaluator = setting.evaluator(setting.load())
        self.backbone = evaluator.backbone
        self.axes = axes_of(setting, self.backbone)
        self.features = Features.of(GUIDED, self.backbone)
        self.scores = score_sites(evaluator, GUIDED.scores)
        known = final_scores(logs)
        scores = np.array(list(known.values()))
        self._forest = ExtraTreesRegressor(
            400, min_samples_leaf=2, bootstrap=True, oob_score=True, random_state=0
        ).fit([self._numbers(configuration) for configuration in known], scores)
        self._unseen = self._forest.oob_prediction_
        self._errors = scores - self._unseen
        self.determination = float(self._forest.oob_score_)
        self._foretold: dict[Configuration, float] = {}
        _, largest = GUIDED.extremes(self.backbone)
        self._whole = self.features.compute(largest, lambda block: False)

    def _numbers(self, configuration: Configuration) -> list[float]:
        """Return what the forest is given of a configuration."""
        blocks = [site.block for site, _ in configuration] or [len(self.backbone.blocks)]
        parameters = count_parameters(self.backbone, configuration)
        counts = [len(configuration), parameters, sum(adapter.size or 0 for _, adapter in configuration)]
        places = [min(blocks), max(blocks), statistics.fmean(blocks)]
        return [configuration.learning_rate, *counts, *places, *self.features.placement(configuration)]

    def foretold(self, configuration: Configuration) -> float:
        """Return what a configuration reaches."""
        if configuration not in self._foretold:
            self._foretold[configuration] = float(self._forest.predict([self._numbers(configuration)])[0])
        return self._foretold[configuration]

    def cost(self, configuration: Configuration, *, is_served: bool) -> float:
        """Return what a training takes, as a share of one through all blocks."""
        return self.features.compute(configuration, lambda block: is_served) / self._whole

    def train(self, configuration: Configuration, generator: random.Random) -> float:
        """Return what a training of a configuration gives."""
        foretold, axis = self.foretold(configuration), self.axes[0]
        near = np.argsort(np.abs(self._unseen - foretold), kind="stable")[:_NEAREST]
        score = foretold + float(self._errors[generator.choice(near.tolist())])
        return min(axis.best, max(axis.worst, score))

    def point(self, configuration: Configuration, score: float) -> Values:
        """Return a configuration's place, for a score."""
        metric, parameters = (axis.objective.name for axis in self.axes)
        return {metric: score, parameters: count_parameters(self.backbone, configuration)}


class Simulated:
    """One search in a world.

    Args:
        world: Answers for trainings.
        seed: Of the search and of the trainings' errors.
        is_served: Whether trainings do without running the blocks below the lowest adapted one.
    """

    def __init__(self, world: World, seed: int, *, is_served: bool) -> None:
        self.world, self.seed, self.is_served = world, seed, is_served
        self.scores: dict[Configuration, list[float]] = {}
        self.spent = 0.0
        self._luck = random.Random(f"luck of {seed}")

    def train(self, configuration: Configuration) -> None:
        """Train a configuration, once more where it was trained already."""
        self.scores.setdefault(configuration, []).append(self.world.train(configuration, self._luck))
        self.spent += self.world.cost(configuration, is_served=self.is_served)

    def point(self, configuration: Configuration) -> Values:
        """Return a configuration's place, by the mean of its trainings."""
        return self.world.point(configuration, statistics.fmean(self.scores[configuration]))

    def front(self) -> list[Configuration]:
        """Return who is beaten by nobody."""
        points, objectives = map(self.point, self.scores), [axis.objective for axis in self.world.axes]
        flags = non_dominated(list(points), objectives)
        return [configuration for configuration, flag in zip(self.scores, flags, strict=True) if flag]

    def worth(self) -> float:
        """Return the hypervolume of what the front's members reach."""
        members = [self.world.point(member, self.world.foretold(member)) for member in self.front()]
        return hypervolume(members, self.world.axes)

    def train_front_again(self) -> None:
        """Train members of the front that others have come after, as searches do."""
        places = {configuration: place for place, configuration in enumerate(self.scores)}
        for member in self.front():
            later, trainings = len(self.scores) - 1 - places[member], len(self.scores[member])
            if trainings < _MOST_TRAININGS and later >= replication_delay(trainings):
                self.train(member)


def searched(arm: Arm, world: World, seed: int, budget: float) -> list[tuple[float, float]]:
    """Search until the budget is spent; say after each trial how much was, and what the front was worth."""
    backbone = world.backbone
    space, sampler = arm.space.with_scores(world.scores), arm.sampler(seed)
    search = Simulated(world, seed, is_served=arm.is_ours)
    study = optuna.create_study(directions=("maximize", "minimize"))
    if not isinstance(sampler, EhviSampler):
        study.sampler = sampler
    waiting = [baseline.configuration for baseline in space.baselines(backbone)] if arm.is_ours else []
    found = []
    while search.spent < budget:
        if waiting:
            configuration = waiting.pop(0)
        elif isinstance(sampler, EhviSampler):
            configuration = sampler.choose(len(search.scores), space, backbone, _history(search))
        else:
            trial = study.ask()
            configuration = space.suggest(trial, backbone)
        search.train(configuration)
        if not isinstance(sampler, EhviSampler):
            study.tell(trial, list(search.point(configuration).values()))
        if arm.is_ours:
            search.train_front_again()
        found.append((search.spent, search.worth()))
    return found


def _history(search: Simulated) -> History:
    axes, front = search.world.axes, search.front()
    shares = contributions([search.point(member) for member in front], axes)
    return History(
        trials=[(configuration, search.point(configuration)) for configuration in search.scores],
        axes=axes,
        front=dict(zip(front, shares, strict=True)),
        trainings=[len(several) for several in search.scores.values()],
        are_states_served=lambda block: search.is_served,
    )


class RateSampler(EhviSampler):
    """Has models that see the learning rate, not the summed one."""

    features = RateFeatures


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What searches.

    Attributes:
        space: Where.
        sampler: Makes a sampler from a seed.
        is_ours: Whether it has baselines, trains members of the front again and is served hidden states.
    """

    space: SearchSpace
    sampler: Callable[[int], BaseSampler] = lambda seed: EhviSampler(seed=seed)
    is_ours: bool = True


ARMS: Mapping[str, Arm] = {
    OURS: Arm(space=GUIDED),
    "the same sampler in PerLayer": Arm(space=per_layer()),
    "models see the learning rate, not the summed one": Arm(
        space=GUIDED, sampler=lambda seed: RateSampler(seed=seed)
    ),
    "allocations at random": Arm(space=GUIDED, sampler=lambda seed: EhviSampler(seed=seed, modelled=0.0)),
    "Optuna TPE, each training whole": Arm(
        space=per_layer(), sampler=lambda seed: TPESampler(seed=seed), is_ours=False
    ),
}


def measure(world: World, seeds: int, budget: float) -> list[dict[str, Any]]:
    """Return a row for each arm."""
    rows = []
    for name, arm in ARMS.items():
        found: list[list[float]] = []
        for seed in range(seeds):
            curve = searched(arm, world, seed, budget)
            moments = [max(share * budget, curve[0][0]) for share in SHARES]
            found.append([[worth for spent, worth in curve if spent <= end][-1] for end in moments])
        rows.append({"arm": name, "hypervolume": np.array(found).T.tolist()})
        print(f"{name}: {seeds} searches", flush=True)
    return rows


def show(dataset: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a data set's table."""
    table = Table(title=f"{dataset}: hypervolume, mean over seeds (difference from the first row)")
    table.add_column("arm")
    for share in SHARES:
        table.add_column(f"{share:.0%} of the budget", justify="right")
    for row in rows:
        pairs = zip(row["hypervolume"], rows[0]["hypervolume"], strict=True)
        table.add_row(row["arm"], *(_compared(*pair) for pair in pairs))
    Console(width=140).print(table)


def _compared(several: Sequence[float], first: Sequence[float]) -> str:
    if several is first:
        return f"{statistics.fmean(several):.3f}"
    apart = [worth - other for worth, other in zip(several, first, strict=True)]
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return f"{statistics.fmean(several):.3f} ({statistics.fmean(apart):+.3f} ± {error:.3f})"


def main() -> None:
    """Search, print tables, write JSON unless the runs are one's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="two or more")
    parser.add_argument("--budget", type=float, default=48.0, help="in trainings through all blocks")
    parser.add_argument("--runs", type=Path, default=RUNS, help="a file, or a packed one")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: expected two or more, as standard errors are over seeds.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record: dict[str, Any] = {
        "command": f"python -m benchmarks.simulated_search --seeds {arguments.seeds} "
        f"--budget {arguments.budget:g}",
        "datasets": {},
    }
    for dataset in sorted({dataset for _, dataset, *_ in read_runs(arguments.runs)}):
        world = World(dataset, logs_of(dataset, arguments.runs))
        rows = measure(world, arguments.seeds, arguments.budget)
        show(dataset, rows)
        record["datasets"][dataset] = {"determination_out_of_bag": world.determination, "rows": rows}
    if arguments.runs == RUNS:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
