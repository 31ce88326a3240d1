"""Compute to the same hypervolume, of searches that begin from an earlier one and of searches that do not.

    python -m benchmarks.transfer [--pairs questions:spam ...] [--seeds 3] [--units 10] [--rows 256]

Of each pair, the first names the data set of the earlier search (the default strategy on MiniLM, with a seed
of its own) and the second that of the search that begins from it, with as much compute. "wrong" is a bad
match: the earlier search of the second data set itself with every configuration upside down (the adapters of
the highest block in the lowest) and a tenth of its learning rates. A unit is the processor time of one plain
training: rsLoRA of rank 8 on all linear modules, to the end. A search's units are those of its trainings;
scores and proposals, which both have, are not counted. A run has hidden states of its own.

The hypervolume over compute is that of the search's front, in validation, on the search's axes: runs of one
data set share them. The table has the medians over seeds of the units to three levels, shares of what the
searches without a prior have at their end (a run that never gets there took more than all), and of the
hypervolume at the end in validation and on the test split, by the weights that the search kept. Runs that are
done are kept in the folder and not done again; one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft import Configuration, ParetoFront, Search, Site
from autopeft.core.evaluation import TrialRecord
from autopeft.core.pareto import hypervolume
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.study_store import STUDY_FILE, StudyStore, load_study
from autopeft.optimization.trial_records import Spent
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import EXAMPLES, TRAINING
from benchmarks.uniform_lora import uniform

RESULTS = Path(__file__).parent / "results"
WRONG, NONE = "wrong", "none"
PAIRS = ("questions:spam", "spam:questions", "movies:questions", f"{WRONG}:questions")
LEVELS = (0.9, 0.95, 1.0)
_EARLIER_SEED = 100
_RATE_OF_WRONG = 0.1
_MEDIANS = ("validation", "test", "trials", "from_earlier", "from_earlier_on_front")


@dataclass(frozen=True)
class Searches:
    """Makes the searches of a benchmark, in one folder and with so many rows to train on."""

    folder: Path
    rows: int

    def of(self, dataset: str, seed: int, prior: Path | None = None, name: str = "") -> Search:
        """Return a search on a data set."""
        data = DATASETS[dataset]
        return Search(
            str(prepare("minilm")),
            data.task(**EXAMPLES | {"train": self.rows}),
            GUIDED,
            objectives=(data.metric, "trainable_parameters"),
            training=TRAINING,
            seed=seed,
            prior=() if prior is None else prior,
            name=name or f"{dataset}-{seed}",
            folder=self.folder,
            tracking=None,
        )


@contextmanager
def cache_of_its_own() -> Iterator[None]:
    """Keep what one run computes, as hidden states, out of the next."""
    with TemporaryDirectory() as folder, patch.dict(os.environ, AUTOPEFT_CACHE=folder):
        yield


def unit_of(search: Search) -> float:
    """Return the processor time of one plain training."""
    with cache_of_its_own():
        opened = search.open()
        evaluation = opened.evaluator.evaluate(uniform(opened.backbone, rank=8, rate=1e-3))
    return evaluation.cost.cpu_seconds


def upside_down(configuration: Configuration, blocks: int) -> Configuration:
    """Return a configuration with the adapters of the highest block in the lowest, at a tenth of the rate."""
    adapters = {
        Site(blocks - 1 - site.block, site.role): several for site, several in configuration.adapters.items()
    }
    return Configuration(adapters, learning_rate=_RATE_OF_WRONG * configuration.learning_rate)


def made_wrong(source: Search) -> Path:
    """Write a copy of a search that has every configuration upside down, and return its folder."""
    folder = source.folder.with_name(f"{source.name}-{WRONG}")
    if (folder / STUDY_FILE).exists():
        return folder
    attributes, records = load_study(source.folder)
    blocks = int(attributes["identity"]["backbone"]["blocks"])
    with closing(StudyStore(folder, folder.name, source.objectives)) as study:
        for record in records:
            turned = upside_down(record.evaluation.configuration, blocks)
            evaluation = replace(record.evaluation, configuration=turned)
            study.tell(
                replace(record, evaluation=evaluation),
                Proposal(configuration=turned, params={}, distributions={}),
            )
        for name in ("identity", "metrics", "axes"):
            study.set_attribute(name, attributes[name])
    return folder


def run(search: Search, unit: float, units: float) -> dict[str, Any]:
    """Run a search, or go on with it; return its hypervolume over units, and what it has at its end."""
    path = search.folder / "curve.jsonl"

    def note(record: TrialRecord, front: ParetoFront) -> None:
        spent = Spent.of(front.records).cost.cpu_seconds / unit
        with path.open("a") as file:
            file.write(json.dumps([spent, front.hypervolume]) + "\n")

    with cache_of_its_own():
        front = search.run(cpu_seconds=units * unit, progress=False, callbacks=[note])
        evaluator = search.open().evaluator
        checkpoints = AdapterCheckpoints(search.folder / "adapters")
        tests = []
        for point in front:
            state = checkpoints.load(point.record)
            assert state is not None  # of what is on the front
            tests.append({**point.values, **evaluator.test(point.configuration, state)})
    curve = [json.loads(line) for line in path.read_text().splitlines()]
    from_earlier = {record.number for record in front.records if (record.baseline or "").startswith("trial ")}
    return {
        "curve": curve,
        "validation": front.hypervolume,
        "test": hypervolume(tests, front.axes),
        "trials": len(front.records),
        "from_earlier": len(from_earlier),
        "from_earlier_on_front": len(front.members & from_earlier),
    }


def units_to(curve: Sequence[Sequence[float]], level: float) -> float:
    """Return the units at which a level of hypervolume is first reached; infinity where it never is."""
    return next((units for units, reached in curve if reached >= level), math.inf)


def rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a target and prior: medians over seeds, and units relative to those without a prior."""
    found = []
    for target in dict.fromkeys(each["target"] for each in runs):
        own = [each for each in runs if each["target"] == target]
        end = statistics.median(each["validation"] for each in own if each["prior"] == NONE)
        without: dict[str, float] = {}
        for prior in dict.fromkeys(each["prior"] for each in own):  # the first is none
            seeds = [each for each in own if each["prior"] == prior]
            to = {
                f"{level:.0%}": statistics.median(units_to(each["curve"], level * end) for each in seeds)
                for level in LEVELS
            }
            without = without or to
            medians = {name: statistics.median(each[name] for each in seeds) for name in _MEDIANS}
            relative = {level: to[level] / without[level] for level in to}
            found.append({"target": target, "prior": prior, "units_to": to, "relative": relative, **medians})
    return found


def show(table_rows: Sequence[dict[str, Any]], units: float) -> None:
    """Print the table."""
    table = Table(title=f"Units to a share of the hypervolume without a prior at {units:g} units (medians)")
    ends = ("validation", "test", "trials", "of the prior", "on the front")
    for heading in ("target", "prior", *(f"{level:.0%}" for level in LEVELS), *ends):
        table.add_column(heading, justify="left" if heading in ("target", "prior") else "right")
    for row in table_rows:
        cells = [
            "–" if math.isinf(to) else f"{to:.2f} ({row['relative'][level]:.2f}×)"
            for level, to in row["units_to"].items()
        ]
        ending = (f"{row[name]:.3g}" for name in _MEDIANS)
        table.add_row(row["target"], row["prior"], *cells, *ending)
    Console(width=120).print(table)


def main() -> None:
    """Run what is missing, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help=f"earlier:target, of {', '.join(DATASETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--units", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=EXAMPLES["train"], help="to train on")
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/transfer"))
    given = parser.parse_args()
    pairs = [pair.partition(":")[::2] for pair in given.pairs]
    for earlier, target in pairs:
        if target not in DATASETS or earlier not in (*DATASETS, WRONG):
            parser.error(
                f"{earlier}:{target} is no pair: there are {', '.join(DATASETS)}, and earlier {WRONG}"
            )
    torch.set_num_threads(1)
    searches = Searches(given.folder, given.rows)
    kept = given.folder / f"{given.units:g}-units-{given.rows}-rows.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def once(name: str, make: Callable[[], Any]) -> Any:
        if name not in done:
            done[name] = make()
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(done) + "\n")
        return done[name]

    def ran(search: Search, dataset: str) -> Any:
        unit = once(f"unit of {dataset}", lambda: unit_of(searches.of(dataset, 0)))
        result = once(search.name, lambda: run(search, unit, given.units))
        print(f"{search.name}: {result['validation']:.3f}, test {result['test']:.3f}", flush=True)
        return result

    targets = dict.fromkeys(target for _, target in pairs)
    priors: dict[tuple[str, str], Path | None] = {(NONE, target): None for target in targets}
    for earlier, target in pairs:
        dataset = target if earlier == WRONG else earlier
        source = searches.of(dataset, _EARLIER_SEED)
        ran(source, dataset)
        priors[earlier, target] = made_wrong(source) if earlier == WRONG else source.folder
    runs = []
    for seed in range(given.seeds):
        for (earlier, target), prior in priors.items():
            search = searches.of(target, seed, prior, f"{target}-from-{earlier}-{seed}")
            runs.append({"target": target, "prior": earlier, "seed": seed, **ran(search, target)})
    table = rows(runs)
    show(table, given.units)
    record = {
        "command": f"python -m benchmarks.transfer --pairs {' '.join(given.pairs)} --seeds {given.seeds} "
        f"--units {given.units:g} --rows {given.rows}",
        "machine": this_machine("1 thread"),
        "unit_cpu_seconds": {target: done[f"unit of {target}"] for target in targets},
        "rows": [
            {**row, "units_to": finite(row["units_to"]), "relative": finite(row["relative"])} for row in table
        ],
        "runs": runs,
    }
    (RESULTS / "transfer.json").write_text(json.dumps(record, indent=1) + "\n")


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Return numbers with None in place of those that are not finite, which JSON does not have."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


if __name__ == "__main__":
    main()
