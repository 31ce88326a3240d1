"""How well a model of a search's first trials foretells what other configurations reach.

    python -m benchmarks.surrogate [--after 6 9 13 18 24] [--runs FILE]

Trains nothing: reads runs of `python -m benchmarks.search_cost`, those in `benchmarks/results` unless told
otherwise. A model learns from the first trials that one of autopeft's runs trained to the end, with the
scores these had at that moment; what a search knows beyond them, of paused and of failed trainings, is not in
the runs. It foretells the validation score of every other configuration of LoRA that any run on the same data
set trained, but the head alone. Figures are Spearman's rank correlation and the root mean square error, for
configurations of few adapters and of many: means over moments, then means and standard errors over runs.

Each row but the first has one thing changed. Features and priors were chosen with an earlier version's runs
on the same data sets, which are among the configurations to foretell; the forest, which is the kind of model
that SMAC has, was not tuned.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.ensemble import RandomForestRegressor

from autopeft.core.configuration import Configuration
from autopeft.core.objectives import Objective
from autopeft.optimization.expected_improvement import Features
from autopeft.optimization.gaussian_process import Array, GaussianProcess, Inputs
from autopeft.search_spaces.learning_rates import log_place
from benchmarks.rivals.comparison import read_runs
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import RATE, Entry, Setting

RESULTS = Path(__file__).parent / "results" / "surrogate.json"
RUNS = RESULTS.with_name("search_cost_runs.jsonl.gz")
SIZES = {"few adapters (1 to 4)": range(1, 5), "many adapters": range(5, 100)}
OURS = "autopeft"
SCORE = Objective(name="accuracy", direction="maximize", unit="score")
Logs = Mapping[tuple[str, int], Sequence[Entry]]
Model = Callable[[Inputs, Array, Array, Inputs], Array]


class RateFeatures(Features):
    """Has the learning rate in place of the summed one."""

    def of_metric(self, configuration: Configuration) -> list[float]:
        """Return the features that say what a configuration reaches, its placement apart."""
        _, *others = super().of_metric(configuration)
        return [log_place(configuration.learning_rate, *RATE), *others]


class BlockFeatures(Features):
    """Has the share of the blocks below the lowest adapted one as well."""

    def of_metric(self, configuration: Configuration) -> list[float]:
        """Return the features that say what a configuration reaches, its placement apart."""
        return [*super().of_metric(configuration), self.frozen_share(configuration)]


class UnplacedFeatures(Features):
    """Does not say which sites carry adapters."""

    def placement(self, configuration: Configuration) -> list[float]:
        """Return nothing."""
        return []


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a run had trained to the end at a moment.

    Attributes:
        configurations: Trained by then.
        scores: (configurations,) of the metric; where there were several trainings, their mean.
        trainings: (configurations,) how many.
    """

    configurations: Sequence[Configuration]
    scores: Array
    trainings: Array


def logs_of(dataset: str, path: Path) -> dict[tuple[str, int], list[Entry]]:
    """Return the longest log of each method and seed on a data set; shorter ones begin alike."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for (method, name, seed, _), log in read_runs(path).items():
        if name == dataset:
            found[method, seed] = max(found.get((method, seed), []), log, key=len)
    return found


def known_after(log: Sequence[Entry], numbers: Sequence[int]) -> Iterator[Known]:
    """Say what was known when so many configurations had been trained to the end."""
    found: dict[Configuration, list[float]] = {}
    for entry in log:
        if entry.score is None:
            continue
        configuration = Configuration.from_dict(entry.configuration)
        is_new = configuration not in found
        found.setdefault(configuration, []).append(entry.score)
        if is_new and len(found) in numbers:
            yield Known(
                configurations=list(found),
                scores=np.array([several[-1] for several in found.values()]),
                trainings=np.array([float(len(several)) for several in found.values()]),
            )


def final_scores(logs: Logs) -> dict[Configuration, float]:
    """Return what every configuration of `GUIDED`'s methods reached in the end, its mean over runs."""
    found: dict[Configuration, list[float]] = {}
    for log in logs.values():
        last = {
            Configuration.from_dict(entry.configuration): entry.score
            for entry in log
            if entry.score is not None
        }
        for configuration, score in last.items():
            if set(configuration.methods) <= set(GUIDED.methods):
                found.setdefault(configuration, []).append(score)
    return {trained: statistics.fmean(several) for trained, several in found.items()}


def gaussian_process(inputs: Inputs, scores: Array, trainings: Array, others: Inputs) -> Array:
    """Foretell as a search does."""
    mean, _ = GaussianProcess(inputs, scores, trainings).predict(others)
    return mean


def random_forest(inputs: Inputs, scores: Array, trainings: Array, others: Inputs) -> Array:
    """Foretell with a random forest, as scikit-learn has it."""
    forest = RandomForestRegressor(random_state=0)
    forest.fit(np.hstack(inputs), scores, sample_weight=trainings)
    foretold: Array = forest.predict(np.hstack(others))
    return foretold


def models(features: Features) -> dict[str, tuple[Model, Features]]:
    """Return models by name, with what they are given of a configuration."""
    options = {field.name: getattr(features, field.name) for field in fields(features)}
    return {
        OURS: (gaussian_process, features),
        "the learning rate, not the summed one": (gaussian_process, RateFeatures(**options)),
        "the lowest block as well": (gaussian_process, BlockFeatures(**options)),
        "no placement": (gaussian_process, UnplacedFeatures(**options)),
        "random forest": (random_forest, features),
    }


def figures(
    known: Known, truth: Mapping[Configuration, float], model: Model, features: Features
) -> dict[str, tuple[float, float]]:
    """Return rank correlation and error of what a model foretells, by size of configuration."""
    tried = set(known.configurations)
    others = [configuration for configuration in truth if configuration not in tried and len(configuration)]
    foretold = model(
        features.inputs(known.configurations, SCORE),
        known.scores,
        known.trainings,
        features.inputs(others, SCORE),
    )
    true = np.array([truth[other] for other in others])
    found = {}
    for size, adapters in SIZES.items():
        chosen = np.array([len(other) in adapters for other in others])
        ranks_nobody = np.ptp(foretold[chosen]) == 0
        correlation = 0.0 if ranks_nobody else float(spearmanr(foretold[chosen], true[chosen]).statistic)
        error = float(np.sqrt(np.mean((foretold[chosen] - true[chosen]) ** 2)))
        found[size] = correlation, error
    return found


def measure(logs: Logs, features: Features, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each model, with a figure for each of autopeft's runs."""
    truth = final_scores(logs)
    histories = [list(known_after(log, numbers)) for (method, _), log in logs.items() if method == OURS]
    rows = []
    for name, (model, given) in models(features).items():
        row: dict[str, Any] = {"model": name, "configurations": len(truth)}
        found = [[figures(known, truth, model, given) for known in history] for history in histories]
        for size in SIZES:
            for index, figure in enumerate(("rank_correlation", "error")):
                row.setdefault(size, {})[figure] = [
                    statistics.fmean(by_size[size][index] for by_size in several) for several in found
                ]
        rows.append(row)
    return rows


def show(dataset: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a data set's table."""
    table = Table(title=f"{dataset}: rank correlation and error, {rows[0]['configurations']} configurations")
    table.add_column("model")
    for size in SIZES:
        table.add_column(size, justify="right")
    for row in rows:
        cells = (
            f"{_mean(row[size]['rank_correlation'])}, {statistics.fmean(row[size]['error']):.3f}"
            for size in SIZES
        )
        table.add_row(row["model"], *cells)
    Console(width=110).print(table)


def _mean(several: Sequence[float]) -> str:
    error = statistics.stdev(several) / math.sqrt(len(several)) if len(several) > 1 else math.nan
    return f"{statistics.fmean(several):.2f} ± {error:.2f}"


def main() -> None:
    """Measure, print tables, write JSON unless the runs are one's own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--after", type=int, nargs="+", default=[6, 9, 13, 18, 24], help="so many trials")
    parser.add_argument("--runs", type=Path, default=RUNS, help="a file, or a packed one")
    arguments = parser.parse_args()
    after = " ".join(map(str, arguments.after))
    record: dict[str, Any] = {"command": f"python -m benchmarks.surrogate --after {after}", "datasets": {}}
    for dataset in sorted({name for method, name, *_ in read_runs(arguments.runs) if method == OURS}):
        features = Features.of(GUIDED, Setting(dataset=dataset, seed=0, trials=1).load())
        rows = measure(logs_of(dataset, arguments.runs), features, arguments.after)
        show(dataset, rows)
        record["datasets"][dataset] = rows
    if arguments.runs == RUNS:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
