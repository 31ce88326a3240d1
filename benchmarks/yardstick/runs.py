"""What methods have found, by the compute it took: kept line by line, and what it is worth at some moment."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from autopeft.core.configuration import Configuration
from autopeft.core.durable_files import load_json, save_json
from autopeft.core.evaluation import Cost
from autopeft.core.objectives import Objective
from autopeft.core.pareto import Axis, Values, contributions, non_dominated


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a configuration, and how much compute its method had spent by then.

    Attributes:
        units: Compute of the method so far, in plain trainings.
        configuration: What was evaluated; None where compute alone is noted.
        values: Its objectives on the validation split; None unless it was trained to the end.
        cut_from: The configuration that was trained, where this one was cut from it.
        rungs: Its objectives at each rung that it reached.
    """

    units: float
    configuration: Configuration | None = None
    values: Values | None = None
    cut_from: Configuration | None = None
    rungs: tuple[Values, ...] = ()

    @property
    def trained(self) -> Configuration:
        """The configuration that was trained."""
        found = self.configuration if self.cut_from is None else self.cut_from
        assert found is not None  # the head alone is a configuration, and false
        return found

    @property
    def key(self) -> str:
        """The same for the same configuration, cut from the same one."""
        assert self.configuration is not None
        return f"{self.trained.key} {self.configuration.key}"

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        configurations = {"configuration": self.configuration, "cut_from": self.cut_from}
        return vars(self) | {
            name: None if known is None else known.to_dict() for name, known in configurations.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Read what `to_dict` gave."""
        configurations = {
            name: None if data[name] is None else Configuration.from_dict(data[name])
            for name in ("configuration", "cut_from")
        }
        return cls(**{**data, **configurations, "rungs": tuple(data["rungs"])})


def seconds_of(cost: Cost) -> float:
    """Return the processor time of all threads; on a GPU, the time in which it was held."""
    return cost.gpu_seconds or cost.cpu_seconds


def lines_of(path: Path) -> list[bytes]:
    """Return a file's lines but for one that a killed process has not finished; none without a file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def drop_unfinished_line(path: Path) -> None:
    """Make a file end with a whole line, so that further ones can follow."""
    if path.exists():
        os.truncate(path, sum(map(len, lines_of(path))))


def read_outcomes(path: Path) -> list[Outcome]:
    """Return what a run has left in a file."""
    return [Outcome.from_dict(json.loads(line)) for line in lines_of(path)]


class RunLog:
    """The outcomes of one method with one seed, in a file: the next process goes on after the last.

    Args:
        path: The file.
        unit_seconds: What a plain training takes on this machine.

    Attributes:
        outcomes: In their order.
        units: Compute so far, in plain trainings.
    """

    def __init__(self, path: Path, unit_seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.outcomes = read_outcomes(path)
        self.units = self.outcomes[-1].units if self.outcomes else 0.0
        self.unit_seconds, self._path = unit_seconds, path
        drop_unfinished_line(path)

    def spend(self, seconds: float) -> None:
        """Count compute."""
        self.units += seconds / self.unit_seconds

    def add(self, configuration: Configuration | None = None, **known: Any) -> None:
        """Keep an outcome of this moment; for the arguments see `Outcome`."""
        outcome = Outcome(units=self.units, configuration=configuration, **known)
        self.outcomes.append(outcome)
        with self._path.open("a") as file:
            file.write(json.dumps(outcome.to_dict()) + "\n")

    def end(self, budget: float) -> None:
        """Note of a method that stopped before its budget that it has nothing more to try until then."""
        if self.units < budget:
            self.units = budget
            self.add()

    @property
    def tried(self) -> list[Outcome]:
        """The outcomes of configurations."""
        return [outcome for outcome in self.outcomes if outcome.configuration is not None]


class Archive:
    """What is done on one task, in a folder: measurements of the task, runs, and tests of their fronts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._task, self._tests = folder / "task.json", folder / "tests.jsonl"
        known = load_json(self._task) or {}
        self.ends: dict[str, list[float]] = known.get("ends", {})
        self.unit_seconds: dict[str, float] = known.get("unit_seconds", {})
        drop_unfinished_line(self._tests)
        self.tests: dict[str, dict[int, Values]] = {}
        for line in map(json.loads, lines_of(self._tests)):
            self.tests.setdefault(line["key"], {})[line["seed"]] = line["values"]

    def add_task(self, axes: Sequence[Axis], unit_seconds: float) -> None:
        """Keep the ends of the axes, where they are not known of another machine, and this one's unit."""
        self.ends = self.ends or {axis.objective.name: [axis.worst, axis.best] for axis in axes}
        self.unit_seconds[platform.node()] = unit_seconds
        save_json(self._task, {"ends": self.ends, "unit_seconds": self.unit_seconds})

    def axes(self, objectives: Sequence[Objective]) -> tuple[Axis, ...]:
        """Return the axes of the hypervolume, of those objectives that have one."""
        known = ((each, self.ends[each.name]) for each in objectives if each.name in self.ends)
        return tuple(Axis(objective=each, worst=worst, best=best) for each, (worst, best) in known)

    def path(self, method: str, seed: int) -> Path:
        """Return the file of a run."""
        return self.folder / "runs" / f"{method} {seed}.jsonl"

    def add_test(self, outcome: Outcome, seed: int, values: Values) -> None:
        """Keep a fresh training's objectives, the metric on the test split."""
        self.tests.setdefault(outcome.key, {})[seed] = values
        with self._tests.open("a") as file:
            file.write(json.dumps({"key": outcome.key, "seed": seed, "values": values}) + "\n")


def is_done(outcomes: Sequence[Outcome], budget: float) -> bool:
    """Whether a run has spent its budget."""
    return bool(outcomes) and outcomes[-1].units >= budget


def front_at(outcomes: Sequence[Outcome], units: float, axes: Sequence[Axis], most: int) -> list[Outcome]:
    """Return what one would choose from after some compute, by what is known from the validation split.

    Args:
        outcomes: Of a run; of a configuration that was trained again, the latest counts.
        units: The compute.
        axes: Of the hypervolume.
        most: So many of the front at most, those that add most to its hypervolume.
    """
    objectives = [axis.objective for axis in axes]
    latest = {
        outcome.key: outcome
        for outcome in outcomes
        if outcome.values is not None and outcome.units <= units * (1 + 1e-9)
    }
    points: dict[tuple[float, ...], Outcome] = {}
    for outcome in latest.values():  # equal points would add nothing to each other
        assert outcome.values is not None
        points.setdefault(tuple(outcome.values[objective.name] for objective in objectives), outcome)
    members = list(compress(points.values(), non_dominated(_values(points.values()), objectives)))
    shares = contributions(_values(members), axes)
    order = sorted(range(len(members)), key=lambda place: -shares[place])
    return [members[place] for place in order[:most]]


def _values(outcomes: Any) -> list[Values]:
    return [outcome.values for outcome in outcomes]


def mean_of(trainings: Sequence[Values]) -> Values:
    """Return the mean of every objective over several trainings."""
    return {name: sum(values[name] for values in trainings) / len(trainings) for name in trainings[0]}
