"""The yardstick: what a front is worth after 5, 10, 20 and 40 plain trainings' compute, on real tasks.

    python -m benchmarks.front_per_compute [--tasks tuning | held-out | NAME ...] [--methods NAME ...]
        [--seeds 3] [--units 5 10 20 40] [--hours H] [--set training.epochs=2 ...]

A unit is the compute of one plain training: rsLoRA of rank 8 on all linear modules, to the end, through the
whole model, on the same machine (the quicker of two). Fronts are chosen on the validation split, at most
eight points of each; these are trained again with two fresh seeds, all alike and from random weights, and
valued by their means on the test split. The axes run from the metric's trivial score to its best, and from
what the default space's largest configuration costs to its smallest, on a log scale. Hypervolume is taken of
all objectives (metric, trainable parameters, peak memory), and of the metric and parameters alone. Figures
are medians over the methods' seeds, in brackets the lowest and the highest: of three seeds, these have the
median of all seeds between them with a probability of 75 %, of five with 94 %.

Tasks, methods and what compute counts: `benchmarks.yardstick`. Tasks named "tuning" are there to choose
defaults by; those named "held-out" are run once at the end, and reported whatever they say.

What is done is kept in a folder and not done again, trial by trial: the same command goes on after an
interruption, or on another machine with the folder copied, where the unit is measured anew. After a change
of a method, give another folder. With `--hours`, nothing begins after them but the trainings of fronts.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from autopeft.core.pareto import Axis, Values, fixed_axes, hypervolume
from autopeft.evaluation.derived import measured_cut
from autopeft.search_spaces import ScoreGuided
from benchmarks.machine import this_machine
from benchmarks.uniform_lora import uniform
from benchmarks.yardstick.methods import METHODS, OURS, PROTOCOL, SWEEP, Run
from benchmarks.yardstick.runs import (
    Archive,
    Outcome,
    RunLog,
    front_at,
    is_done,
    mean_of,
    read_outcomes,
    seconds_of,
)
from benchmarks.yardstick.tasks import TASKS, FrontTask

RESULTS = Path(__file__).parent / "results"
UNITS = (5.0, 10.0, 20.0, 40.0)
KINDS = ("all objectives", "metric and parameters")
_FRESH = 1000
_TOGETHER = 12  # points that one process trains again


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared on every task.

    Attributes:
        methods: Names of methods.
        seeds: Of the methods, from 0.
        units: Compute at which fronts are compared, in plain trainings, rising.
        fresh_seeds: Trainings of each point of a front.
        most: Points of a front at most.
        deadline: No method begins after it, in seconds since the epoch.
    """

    methods: Sequence[str] = tuple(METHODS)
    seeds: int = 3
    units: Sequence[float] = UNITS
    fresh_seeds: int = 2
    most: int = 8
    deadline: float = math.inf

    def path(self, archive: Archive, method: str, seed: int) -> Path:
        """Return the file of a run: AutoPEFT's protocol is another one with another budget."""
        budget = f", {max(self.units):g} units" * (method == PROTOCOL)
        return archive.path(f"{method}{budget}", seed)

    @property
    def fresh(self) -> range:
        """The seeds of trainings that no method has."""
        return range(_FRESH, _FRESH + self.fresh_seeds)


def set_up(task: FrontTask) -> tuple[tuple[Axis, ...], float]:
    """Return the axes of a task, and the seconds of a plain training on this machine."""
    torch.set_num_threads(1)
    evaluator = task.evaluator()
    bounds = {
        metric.name: (
            evaluator.task.trivial_score(metric.name, evaluator.data),
            evaluator.task.best_score(metric.name),
        )
        for metric in evaluator.objectives
        if metric.is_metric
    }
    space = ScoreGuided(learning_rate=1e-3)  # on which costs do not depend
    ends = [evaluator.costs(configuration) for configuration in space.ends(evaluator.backbone)]
    plain = uniform(evaluator.backbone, 8, 1e-3)
    trainings = [evaluator.evaluate(plain) for _ in range(2)]
    if failed := [training.reason for training in trainings if training.status != "complete"]:
        raise RuntimeError(f"The plain training failed: {failed[0]}")
    seconds = min(seconds_of(training.cost) for training in trainings)
    return fixed_axes(evaluator.objectives, bounds, ends), seconds


def run(method: str, task: FrontTask, seed: int, archive: Archive, plan: Plan) -> str:
    """Run a method until its budget is spent; return how that ended, in words."""
    if time.time() > plan.deadline:
        return "left for another call"
    torch.set_num_threads(1)
    log = RunLog(plan.path(archive, method, seed), archive.unit_seconds[platform.node()])
    folder = archive.folder / "searches" / f"{method} {seed}"
    settings = Run(
        task=task,
        seed=seed,
        budget=max(plan.units),
        axes=archive.axes(task.search().objectives),
        log=log,
        folder=folder,
    )
    # A cache of its own: another run's hidden states would be had for nothing.
    with patch.dict(os.environ, AUTOPEFT_CACHE=str(folder / "cache")):
        try:
            METHODS[method](settings)
        except ValueError as error:
            if log.outcomes or method == OURS:  # it works with every task
                raise
            return f"left out: {error}"
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return f"{len(log.tried)} outcomes"


def train_again(task: FrontTask, members: Sequence[Outcome], seed: int) -> list[Values]:
    """Train members of fronts with a fresh seed; return their objectives, the metric on the test split."""
    torch.set_num_threads(1)
    evaluator = task.evaluator()
    metric = evaluator.monitor.name
    found: list[Values] = []
    for trained, several in groupby(members, key=lambda member: member.trained):
        whole = evaluator.train(trained, seed)
        for member in several:
            outcome, test = whole, evaluator.task.trivial_score(metric, evaluator.data)
            assert member.configuration is not None
            if whole.state is not None and member.cut_from is not None:
                outcome = measured_cut(evaluator, whole, member.configuration)
            if outcome.state is not None:
                test = evaluator.test(member.configuration, outcome.state)[metric]
            known = {**(member.values or {}), **outcome.evaluation.values, metric: test}
            found.append({objective.name: known[objective.name] for objective in evaluator.objectives})
    return found


@dataclass(frozen=True)
class Comparison:
    """All methods on one task: what is missing is done in a pool of processes."""

    task: FrontTask
    plan: Plan
    archive: Archive
    pool: Executor

    def results(self) -> dict[str, Any]:
        """Do what is missing, and return the task's part of the results."""
        if platform.node() not in self.archive.unit_seconds:
            self.archive.add_task(*self.pool.submit(set_up, self.task).result())
        self._run_missing()
        logs = {method: self._done(method) for method in self.plan.methods}
        self._train_missing([log for of_method in logs.values() for log in of_method.values()])
        return {
            "unit_seconds": list(self.archive.unit_seconds.values()),  # of each machine
            "axes": self.archive.ends,
            "rows": [self.row(method, of_method) for method, of_method in logs.items() if of_method],
        }

    @property
    def _kinds(self) -> dict[str, Sequence[Axis]]:
        """The axes of each kind of hypervolume."""
        axes = self.archive.axes(self.task.search().objectives)
        two = [axis for axis in axes if axis.objective.name != "peak_memory"]
        return dict(zip(KINDS, (axes, two), strict=True))

    def _done(self, method: str) -> dict[int, list[Outcome]]:
        """Return the outcomes of a method by seed, of runs that have spent their budget."""
        paths = {seed: self.plan.path(self.archive, method, seed) for seed in range(self.plan.seeds)}
        logs = {seed: read_outcomes(path) for seed, path in paths.items()}
        return {seed: log for seed, log in logs.items() if is_done(log, max(self.plan.units))}

    def _run_missing(self) -> None:
        futures = {
            self.pool.submit(run, method, self.task, seed, self.archive, self.plan): f"{method}, seed {seed}"
            for seed in range(self.plan.seeds)
            for method in self.plan.methods
            if seed not in self._done(method)
        }
        for future in as_completed(futures):
            if future.exception() is not None:  # it is raised when what has begun is done
                self.pool.shutdown(wait=False, cancel_futures=True)
            print(f"{futures[future]}: {future.result()}", flush=True)

    def _train_missing(self, logs: Sequence[Sequence[Outcome]]) -> None:
        """Train again what is on some front with the seeds that are missing."""
        needed = {
            member.key: member
            for log in logs
            for axes in self._kinds.values()
            for units in self.plan.units
            for member in front_at(log, units, axes, self.plan.most)
        }
        members = sorted(needed.values(), key=lambda member: member.key)  # cuts of one training together
        futures = {}
        for seed in self.plan.fresh:
            missing = [member for member in members if seed not in self.archive.tests.get(member.key, {})]
            for start in range(0, len(missing), _TOGETHER):
                some = missing[start : start + _TOGETHER]
                futures[self.pool.submit(train_again, self.task, some, seed)] = some, seed
        for count, future in enumerate(as_completed(futures), 1):
            some, seed = futures[future]
            for member, values in zip(some, future.result(), strict=True):
                self.archive.add_test(member, seed, values)
            print(f"fronts trained again, {count} of {len(futures)}", flush=True)

    def row(self, method: str, logs: Mapping[int, Sequence[Outcome]]) -> dict[str, Any]:
        """Return a method's hypervolumes, by kind and units, and its last fronts."""
        plan = self.plan
        tests = {
            key: mean_of([known[seed] for seed in plan.fresh])
            for key, known in self.archive.tests.items()
            if known.keys() >= {*plan.fresh}
        }
        found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        fronts: dict[str, list[Values]] = {}
        for kind, axes in self._kinds.items():
            for units in plan.units:
                values = {}
                for seed, log in logs.items():
                    points = [tests[member.key] for member in front_at(log, units, axes, plan.most)]
                    values[str(seed)] = hypervolume(points, axes)
                    if kind == KINDS[0]:
                        fronts[str(seed)] = points
                found[kind][f"{units:g}"] = {
                    "median": statistics.median(values.values()),
                    "interval": [min(values.values()), max(values.values())],
                    "by_seed": values,
                }
        trained = [sum(outcome.values is not None for outcome in log) for log in logs.values()]
        return {
            "method": method,
            "seeds": len(logs),
            "outcomes": statistics.median(trained),
            "hypervolume": found,
            "fronts_at_the_end": fronts,
        }


def show(name: str, result: Mapping[str, Any], units: Sequence[float]) -> None:
    """Print a task's tables, and whether a quarter of the compute is worth the sweep's whole."""
    rows = {each["method"]: each["hypervolume"] for each in result["rows"]}
    for kind in KINDS:
        table = Table(title=f"{name}: hypervolume of {kind}, test split, by units of a plain training")
        table.add_column("method")
        for each in units:
            table.add_column(f"{each:g}", justify="right")
        for method, found in rows.items():
            table.add_row(method, *(_written(found[kind][f"{each:g}"]) for each in units))
        Console(width=140).print(table)
        if {SWEEP, OURS} <= rows.keys() and (quarter := max(units) / 4) in units:
            ours, theirs = rows[OURS][kind][f"{quarter:g}"], rows[SWEEP][kind][f"{max(units):g}"]
            holds = "holds" if ours["median"] >= theirs["median"] else "does not hold"
            print(
                f"{OURS} at {quarter:g} units, at least the sweep at {max(units):g}: "
                f"{_written(ours)} against {_written(theirs)}, {holds}"
            )


def _written(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['median']:.3f} [{low:.3f}–{high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, train the fronts again, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=["tuning", "held-out", *TASKS], default=["tuning"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="of the methods")
    parser.add_argument("--units", nargs="+", type=float, default=list(UNITS), help="compute, rising")
    parser.add_argument("--fresh-seeds", type=int, default=2, help="trainings of each point of a front")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the tasks")
    parser.add_argument("--name", default="", help="of the results, behind the task's")
    parser.add_argument("--hours", type=float, default=math.inf, help="after which no method begins")
    parser.add_argument("--processes", type=int, default=1, help="runs at once, each with one thread")
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/front_per_compute"))
    given = parser.parse_args(arguments)
    is_whole = given.units == list(UNITS) and given.seeds >= 3 and given.methods == list(METHODS)
    if not given.name and (given.set or not is_whole):
        parser.error("give --name: these are not the yardstick's own figures, which have none")
    plan = Plan(
        methods=given.methods,
        seeds=given.seeds,
        units=sorted(given.units),
        fresh_seeds=given.fresh_seeds,
        deadline=time.time() + given.hours * 3600,
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, context, max_tasks_per_child=1) as pool:
        for name, known in TASKS.items():
            part = "held-out" if known.is_held_out else "tuning"
            if not {name, part} & {*given.tasks}:
                continue
            task, suffix = known.changed(given.set), f"_{given.name}" * bool(given.name)
            print(f"== {name} ({part})", flush=True)
            archive = Archive(given.folder / " ".join([name, *given.set]))
            result = Comparison(task, plan, archive, pool).results()
            show(name, result, plan.units)
            record = {
                "command": command(name, given),
                "machine": this_machine("one thread a run"),
                "task": {"name": name, "part": part, "config": task.config, "changes": list(task.changes)},
                "fresh_seeds": plan.fresh_seeds,
                "points_at_most": plan.most,
                **result,
            }
            (RESULTS / f"front_per_compute_{name}{suffix}.json").write_text(
                json.dumps(record, indent=1) + "\n"
            )


def command(task: str, given: argparse.Namespace) -> str:
    """Return what repeats a task's part; where it keeps its archive is nobody's business."""
    parts = ["python -m benchmarks.front_per_compute --tasks", task, f"--seeds {given.seeds} --units"]
    parts += [*(f"{each:g}" for each in sorted(given.units)), f"--fresh-seeds {given.fresh_seeds}"]
    if given.methods != list(METHODS):
        parts += ["--methods", *map(shlex.quote, given.methods)]
    if given.set:
        parts += ["--set", *map(shlex.quote, given.set)]
    return " ".join([*parts, f"--name {shlex.quote(given.name)}"] if given.name else parts)


if __name__ == "__main__":
    main()
