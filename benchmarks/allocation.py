"""Do scores place LoRA ranks better than uniform LoRA, at the same number of trainable parameters?

    python -m benchmarks.allocation [--datasets questions movies spam] [--budgets ...] [--arms ...]

For every data set, budget and arm (a score with an allocator, uniform LoRA, random scores): the learning rate
is chosen on the validation split from the same grid, the configuration is trained with several seeds, and
scored on the test split. Budgets are those of uniform LoRA: of rank 1 on query and value, which is the
least that people train, and of rank 1, 2, 4 and 8 on all linear modules. Arms are compared by the paired
differences to that LoRA over data sets' seeds. Trainings run one a core; those that are done are kept in a
file and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from assets.prepare import prepare
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from autopeft.sensitivity import SiteScores, compute_scores
from autopeft.training.settings import Training
from benchmarks.allocation_arms import ARMS, BUDGETS, Arm
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "allocation.json"
TRAININGS = Path(__file__).parent / "results" / "allocation_trainings.jsonl"
TRAINING = Training(epochs=4, batch_size=16, validate_every=4, device="cpu")
EXAMPLES = {"train": 512, "validation": 300, "test": 1000}
SCORE_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One training: where, what, and how good."""

    dataset: str
    arm: str
    budget: str
    learning_rate: float
    seed: int
    parameters: int
    validation: float
    test: float

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What tells it from every other training."""
        return self.dataset, self.arm, self.budget, self.learning_rate, self.seed


class Bench:
    """One data set on one resident backbone, in a process with one thread."""

    def __init__(self, dataset: str) -> None:
        torch.set_num_threads(1)
        data = DATASETS[dataset]
        self.dataset = dataset
        self.metric = data.metric
        task = data.task(**EXAMPLES)
        self.backbone = Backbone.load(str(prepare("minilm")), task.head)
        objectives = resolve_objectives((data.metric, "trainable_parameters"), task.metrics)
        self.evaluator = Evaluator(self.backbone, task, TRAINING, objectives)
        self._scores: dict[tuple[str, int], SiteScores] = {}

    def scores(self, name: str, seed: int) -> SiteScores:
        """Return a score from the first batches of the training split; random ones anew for every seed."""
        key = name, seed if name == "random" else 0
        if key not in self._scores:
            loader = iter(self.evaluator.data.train_dataloader())
            batches = [batch for _, batch in zip(range(SCORE_BATCHES), loader, strict=False)]
            self._scores[key] = compute_scores(
                self.backbone, batches, self.evaluator.task, [name], seed=key[1]
            )[name]
        return self._scores[key]

    def train(self, arm: Arm, budget: str, learning_rate: float, seed: int) -> Outcome:
        """Train an arm once."""
        parameters = BUDGETS[budget].parameters(self.backbone)
        scores = self.scores(arm.score, seed)
        configuration = arm.configuration(self.backbone, scores, parameters, learning_rate)
        trained = self.evaluator.train(configuration, seed)
        values, test = trained.evaluation.values, math.nan
        if trained.state is not None:
            test = self.evaluator.test(configuration, trained.state)[self.metric]
        return Outcome(
            dataset=self.dataset,
            arm=arm.name,
            budget=budget,
            learning_rate=learning_rate,
            seed=seed,
            parameters=int(values["trainable_parameters"]),
            validation=values.get(self.metric, math.nan),
            test=test,
        )


def run_cell(dataset: str, arm: Arm, budget: str, seeds: int, known: Sequence[Outcome]) -> list[Outcome]:
    """Choose the learning rate with the first seed, then train with the others."""
    done = {(earlier.learning_rate, earlier.seed): earlier for earlier in known}
    bench: Bench | None = None

    def outcome(learning_rate: float, seed: int) -> Outcome:
        nonlocal bench
        if (learning_rate, seed) not in done:
            bench = bench or _bench(dataset)
            done[learning_rate, seed] = bench.train(arm, budget, learning_rate, seed)
        return done[learning_rate, seed]

    best = max(BUDGETS[budget].rates, key=lambda rate: outcome(rate, 0).validation)
    for seed in range(1, seeds):
        outcome(best, seed)
    return list(done.values())


_BENCHES: dict[str, Bench] = {}


def _bench(dataset: str) -> Bench:
    if dataset not in _BENCHES:
        _BENCHES[dataset] = Bench(dataset)
    return _BENCHES[dataset]


Cell = tuple[str, str, str]
"""Data set, budget and arm."""


def chosen(outcomes: Iterable[Outcome]) -> dict[Cell, dict[int, Outcome]]:
    """Return the outcomes at the chosen learning rate, by data set, budget and arm, then by seed."""
    cells: dict[Cell, list[Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault((outcome.dataset, outcome.budget, outcome.arm), []).append(outcome)
    found = {}
    for key, several in cells.items():
        first = [trained for trained in several if trained.seed == 0]
        rate = max(first, key=lambda trained: trained.validation).learning_rate
        found[key] = {trained.seed: trained for trained in several if trained.learning_rate == rate}
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of its 95 % interval (Student's t); NaN where there are too few."""
    if len(values) < 2:
        return statistics.fmean(values) if values else math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(half)


def gains_of(cell: Cell, cells: Mapping[Cell, Mapping[int, Outcome]]) -> list[float]:
    """Return by how much an arm beats uniform LoRA with the same seeds; nothing for that LoRA itself."""
    dataset, budget, arm = cell
    compared_with = BUDGETS[budget].uniform.name
    if arm == compared_with:
        return []
    uniform = cells.get((dataset, budget, compared_with), {})
    return [outcome.test - uniform[seed].test for seed, outcome in cells[cell].items() if seed in uniform]


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row a data set, budget and arm, with the verdict against uniform LoRA."""
    cells = chosen(outcomes)
    table = []
    for (dataset, budget, arm), by_seed in cells.items():
        mean, half = interval([outcome.test for outcome in by_seed.values()])
        gain, gain_half = interval(gains_of((dataset, budget, arm), cells))
        verdict = "–"
        if not math.isnan(gain_half):
            verdict = "better" if gain > gain_half else "worse" if gain < -gain_half else "no difference"
        table.append(
            {
                "dataset": dataset,
                "budget": budget,
                "arm": arm,
                "parameters": next(iter(by_seed.values())).parameters,
                "learning_rate": next(iter(by_seed.values())).learning_rate,
                "seeds": len(by_seed),
                "test_mean": mean,
                "test_half_width": half,
                "gain": None if math.isnan(gain) else gain,
                "gain_half_width": None if math.isnan(gain_half) else gain_half,
                "verdict": verdict,
            }
        )
    arms, budgets = [arm.name for arm in ARMS], list(BUDGETS)
    return sorted(
        table, key=lambda row: (row["dataset"], budgets.index(row["budget"]), arms.index(row["arm"]))
    )


def pooled(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row an arm: its paired gain over uniform LoRA, over all data sets, budgets and seeds."""
    cells = chosen(outcomes)
    gains: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    for cell in cells:
        gains[cell[2]] += gains_of(cell, cells)
    found = []
    for arm, several in gains.items():
        if several:
            gain, half = interval(several)
            found.append({"arm": arm, "gain": gain, "gain_half_width": half, "pairs": len(several)})
    return found


def report(outcomes: Sequence[Outcome], command: str) -> None:
    """Print the tables and write JSON."""
    console = Console(width=130)
    found = rows(outcomes)
    table = Table(title="Test score at equal parameters (mean ± half width of the 95 % interval)")
    headings = ("data set", "budget: uniform rank", "arm", "parameters", "rate", "test", "gain", "verdict")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("data set", "arm", "verdict") else "right")
    for row in found:
        table.add_row(
            row["dataset"],
            row["budget"],
            row["arm"],
            f"{row['parameters']:,}",
            f"{row['learning_rate']:g}",
            f"{row['test_mean']:.4f} ± {row['test_half_width']:.4f}",
            "–" if row["gain_half_width"] is None else f"{row['gain']:+.4f} ± {row['gain_half_width']:.4f}",
            row["verdict"],
        )
    console.print(table)
    summary = Table(title="Gain over uniform LoRA, all data sets, budgets and seeds together")
    for heading in ("arm", "gain", "pairs"):
        summary.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in pooled(outcomes):
        summary.add_row(row["arm"], f"{row['gain']:+.4f} ± {row['gain_half_width']:.4f}", str(row["pairs"]))
    console.print(summary)
    record = {
        "command": command,
        "machine": this_machine(),
        "examples": EXAMPLES,
        "epochs": TRAINING.epochs,
        "precision": TRAINING.resolved_precision(),
        "rows": found,
        "pooled": pooled(outcomes),
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def load() -> list[Outcome]:
    """Return the trainings that are done."""
    if not TRAININGS.exists():
        return []
    return [Outcome(**json.loads(line)) for line in TRAININGS.read_text().splitlines()]


def main() -> None:
    """Run what is missing, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--arms", nargs="+", choices=[arm.name for arm in ARMS], help="all unless given")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    outcomes = load()
    cells = [
        (dataset, arm, budget)
        for budget in arguments.budgets
        for arm in ARMS
        for dataset in arguments.datasets
        if arguments.arms is None or arm.name in (*arguments.arms, BUDGETS[budget].uniform.name)
    ]
    pool = ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn"))
    with pool:
        futures = []
        for dataset, arm, budget in cells:
            known = [outcome for outcome in outcomes if outcome.key[:3] == (dataset, arm.name, budget)]
            futures.append(pool.submit(run_cell, dataset, arm, budget, arguments.seeds, known))
        for count, future in enumerate(as_completed(futures), 1):
            done = {outcome.key for outcome in outcomes}
            new = [outcome for outcome in future.result() if outcome.key not in done]
            outcomes += new
            with TRAININGS.open("a") as file:
                file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in new)
            if new:
                print(f"{count} of {len(cells)}: {', '.join(new[-1].key[:3])}", flush=True)
    report(outcomes, f"python -m benchmarks.allocation {shlex.join(sys.argv[1:])}".rstrip())


if __name__ == "__main__":
    main()
