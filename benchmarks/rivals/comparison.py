"""What runs of searches are worth: fronts over processor time, trained again, on common axes."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.core.pareto import Axis, hypervolume, non_dominated
from autopeft.methods import count_parameters
from autopeft.models.backbone import Backbone
from benchmarks.rivals.setting import Entry, Setting, per_layer

SHARES = (0.9, 0.95, 0.99)
MOMENTS = 12
FRESH_SEEDS = (1000, 1001)
Values = Mapping[str, float]
_INHERITED = ", inherited"


class Archive:
    """Runs and trainings that are done, as JSON lines in a folder.

    Args:
        folder: Made where it is not there.

    Attributes:
        folder: The same.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._runs = folder / "runs.jsonl"
        self._trainings = folder / "trainings.jsonl"
        self.runs = read_runs(self._runs) if self._runs.exists() else {}
        self.trainings: dict[tuple[str, str, int], float] = {}
        for line in _lines(self._trainings) if self._trainings.exists() else ():
            self.trainings[line["dataset"], line["configuration"], line["seed"]] = line["test"]

    def add_run(self, method: str, setting: Setting, log: Sequence[Entry]) -> None:
        """Keep a run."""
        self.runs[method, setting.dataset, setting.seed, setting.trials] = list(log)
        line = {"method": method, "dataset": setting.dataset, "seed": setting.seed, "trials": setting.trials}
        with self._runs.open("a") as file:
            file.write(json.dumps({**line, "log": [entry.to_dict() for entry in log]}) + "\n")

    def add_training(self, dataset: str, configuration: str, seed: int, test: float) -> None:
        """Keep a training's score on the test split."""
        self.trainings[dataset, configuration, seed] = test
        line = {"dataset": dataset, "configuration": configuration, "seed": seed, "test": test}
        with self._trainings.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_runs(path: Path) -> dict[tuple[str, str, int, int], list[Entry]]:
    """Return the logs in a file of runs, packed (`.gz`) or not, by method, data set, seed and trials."""
    return {
        (line["method"], line["dataset"], line["seed"], line["trials"]): [
            Entry(**entry) for entry in line["log"]
        ]
        for line in _lines(path)
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def moments(logs: Sequence[Sequence[Entry]], count: int = MOMENTS) -> list[float]:
    """Return log-spaced moments of processor time from the first candidate done to the last, of all runs."""
    times = [entry.cpu_seconds for log in logs for entry in log]
    low, high = math.log(min(times)), math.log(max(times))
    return [math.exp(low + (high - low) * index / (count - 1)) for index in range(count)]


def members_at(log: Sequence[Entry], seconds: float, metric: Objective, cost: Objective) -> list[Entry]:
    """Return whom a user would choose from at a moment: done by then, and beaten by nobody in validation.

    Of a configuration that is in the log again, with the mean of several trainings, the latest counts.
    """
    by_then = [
        entry for entry in log if entry.score is not None and entry.cpu_seconds <= seconds * (1 + 1e-9)
    ]
    done = list({key_of(entry): entry for entry in by_then}.values())
    points = [{metric.name: entry.score or 0.0, cost.name: float(entry.parameters)} for entry in done]
    flags = non_dominated(points, (metric, cost))
    return [entry for entry, on_front in zip(done, flags, strict=True) if on_front]


def key_of(entry: Entry) -> str:
    """Return the configuration's key."""
    return Configuration.from_dict(entry.configuration).key


def reached(curve: Sequence[float], times: Sequence[float], level: float) -> float | None:
    """Return the processor time at which a curve reaches a level, between moments on a log scale.

    Args:
        curve: Hypervolume at each moment.
        times: The moments, increasing.
        level: The hypervolume asked for.
    """
    for index, (value, time) in enumerate(zip(curve, times, strict=True)):
        if value >= level:
            if index == 0 or curve[index - 1] >= value:
                return time
            share = (level - curve[index - 1]) / (value - curve[index - 1])
            return float(times[index - 1] ** (1 - share) * time**share)
    return None


def end_of(rival: str) -> str:
    """Return the name of the level that a rival has at its end."""
    return f"{rival}: its end"


def axes_of(setting: Setting, backbone: Backbone) -> tuple[Axis, Axis]:
    """Return the axes of all comparisons: the metric from always predicting the majority, and parameters."""
    metric, cost = resolve_objectives((setting.metric, "trainable_parameters"), setting.task.metrics)
    smallest, largest = (count_parameters(backbone, extreme) for extreme in per_layer().extremes(backbone))
    worst, best = setting.task.trivial_score(setting.metric), setting.task.best_score(setting.metric)
    return (
        Axis(objective=metric, worst=worst, best=best),
        Axis(objective=cost, worst=float(largest), best=float(smallest)),
    )


class Comparison:
    """All runs on one data set, on common axes.

    Args:
        dataset: Name of the data set.
        runs: Logs by method and seed.
        archive: Has the trainings of the fronts.
        fresh_seeds: Seeds of these trainings; no search has used them.
        as_trained: Whether a candidate that was initialised from the largest LoRA is initialised again from
            one, trained with the fresh seed.
        count: Number of moments at which fronts are compared.
    """

    def __init__(
        self,
        dataset: str,
        runs: Mapping[tuple[str, int], Sequence[Entry]],
        archive: Archive,
        *,
        fresh_seeds: Sequence[int] = FRESH_SEEDS,
        as_trained: bool = False,
        count: int = MOMENTS,
    ) -> None:
        setting = Setting(dataset=dataset, seed=0, trials=1)
        self.dataset = dataset
        self.runs = runs
        self.archive = archive
        self.fresh_seeds = tuple(fresh_seeds)
        self.as_trained = as_trained
        self.axes = axes_of(setting, setting.load())
        self.metric, self.cost = (axis.objective for axis in self.axes)
        self.times = moments(list(runs.values()), count)

    def members(self, log: Sequence[Entry], seconds: float) -> list[Entry]:
        """Return a run's front at a moment."""
        return members_at(log, seconds, self.metric, self.cost)

    def needed(self) -> dict[str, Entry]:
        """Return everyone who is on some front at some moment, by what is trained again."""
        return {
            self.key(member): member
            for log in self.runs.values()
            for seconds in self.times
            for member in self.members(log, seconds)
        }

    def key(self, entry: Entry) -> str:
        """Return what is trained again of a candidate: its configuration, and its initial weights."""
        return key_of(entry) + _INHERITED * self.is_warm(entry)

    def is_warm(self, entry: Entry) -> bool:
        """Whether a candidate inherits its weights when trained again."""
        return self.as_trained and entry.warm_start

    def point(self, entry: Entry) -> Values:
        """Return what a member is worth: its test score, the mean over fresh seeds."""
        key = self.key(entry)
        tests = [self.archive.trainings[self.dataset, key, seed] for seed in self.fresh_seeds]
        return {self.metric.name: statistics.fmean(tests), self.cost.name: float(entry.parameters)}

    def curve(self, log: Sequence[Entry]) -> list[float]:
        """Return the hypervolume at each moment.

        A front may lose value when a lucky candidate drives a better one off it: this is not hidden.
        """
        return [
            hypervolume([self.point(member) for member in self.members(log, seconds)], self.axes)
            for seconds in self.times
        ]

    def reference(self) -> float:
        """Return the hypervolume of all fronts together."""
        points = [self.point(member) for log in self.runs.values() for member in self.members(log, math.inf)]
        return hypervolume(points, self.axes)

    def _own_times(self, method: str, seed: int) -> list[float]:
        """Return the moments, those after a run's end taken as its end."""
        end = self.runs[method, seed][-1].cpu_seconds
        return [min(time, end) for time in self.times]

    def rows(self, rivals: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return one row a method: processor time to each level of hypervolume, medians over seeds.

        The levels are shares of the reference, and what each rival has at its end (the median over its
        seeds): where nobody comes near the reference, that says what the same front costs.

        Args:
            rivals: Methods whose end is a level, of those that were run.
        """
        reference = self.reference()
        names = dict.fromkeys(name for name, _ in self.runs)
        curves = {key: self.curve(log) for key, log in self.runs.items()}
        levels = {f"{share:.0%}": share * reference for share in SHARES}
        for rival in rivals:
            ends = [curve[-1] for (method, _), curve in curves.items() if method == rival]
            levels[end_of(rival)] = statistics.median(ends)
        rows = []
        for name in names:
            own = {seed: curve for (method, seed), curve in curves.items() if method == name}
            row: dict[str, Any] = {
                "dataset": self.dataset,
                "method": name,
                "seeds": len(own),
                "share_at_end": statistics.median(curve[-1] / reference for curve in own.values()),
                "cpu_seconds": statistics.median(self.runs[name, seed][-1].cpu_seconds for seed in own),
                "curves": {str(seed): curve for seed, curve in own.items()},
                "times": self.times,
                "seconds_to": {},
            }
            for label, level in levels.items():
                found = [reached(curve, self._own_times(name, seed), level) for seed, curve in own.items()]
                median = statistics.median(math.inf if seconds is None else seconds for seconds in found)
                row["seconds_to"][label] = median if math.isfinite(median) else None
            rows.append(row)
        return rows
