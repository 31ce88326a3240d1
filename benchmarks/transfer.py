"""Compute to the same hypervolume, of searches that begin from an earlier one and of searches that do not.

    python -m benchmarks.transfer [--pairs questions:spam ...] [--seeds 3] [--units 10] [--folder DIR]

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
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Configuration, ParetoFront, Search, Site
from autopeft.core.evaluation import TrialRecord
from autopeft.core.pareto import hypervolume
from autopeft.optimization.budget import Spent
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.study_store import STUDY_FILE, StudyStore, load_study
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.datasets import DATASETS
from benchmarks.rivals.ours import GUIDED
from benchmarks.rivals.setting import TRAINING, Setting
from benchmarks.untuned import uniform

RESULTS = Path(__file__).parent / "results"
WRONG, NONE = "wrong", "none"
PAIRS = ("questions:spam", "spam:questions", "movies:questions", f"{WRONG}:questions")
LEVELS = (0.9, 0.95, 1.0)
_EARLIER_SEED = 100
_RATE_OF_WRONG = 0.1


def made(folder: Path, dataset: str, seed: int, prior: Path | None = None, name: str = "") -> Search:
    """Return a search on a data set."""
    setting = Setting(dataset=dataset, seed=seed, trials=1)
    return Search(
        setting.model,
        setting.task,
        GUIDED,
        objectives=(setting.metric, "trainable_parameters"),
        training=TRAINING,
        seed=seed,
        prior=() if prior is None else prior,
        name=name or f"{dataset}-{seed}",
        folder=folder,
        tracking=None,
    )


@contextmanager
def cache_of_its_own() -> Iterator[None]:
    """Keep what one run computes, as hidden states, out of the next."""
    before = os.environ.get("AUTOPEFT_CACHE")
    with TemporaryDirectory() as folder:
        os.environ["AUTOPEFT_CACHE"] = folder
        yield
    del os.environ["AUTOPEFT_CACHE"]
    if before is not None:
        os.environ["AUTOPEFT_CACHE"] = before


def unit_of(dataset: str) -> float:
    """Return the processor time of one plain training."""
    setting = Setting(dataset=dataset, seed=0, trials=1)
    evaluator = setting.evaluator(setting.load(), precision="auto")
    evaluation = evaluator.evaluate(uniform(evaluator.backbone, rank=8, rate=1e-3))
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
            state = checkpoints.load(point.number)
            assert state is not None  # of what is on the front
            tests.append({**point.values, **evaluator.test(point.configuration, state)})
    curve = [json.loads(line) for line in path.read_text().splitlines()]
    from_earlier = [one.number for one in front.records if (one.baseline or "").startswith("trial ")]
    return {
        "curve": curve,
        "validation": front.hypervolume,
        "test": hypervolume(tests, front.axes),
        "trials": len(front.records),
        "from_earlier": len(from_earlier),
        "from_earlier_on_front": len(front.members.intersection(from_earlier)),
    }


def units_to(curve: Sequence[Sequence[float]], level: float) -> float:
    """Return the units at which a level of hypervolume is first reached; infinity where it never is."""
    return next((units for units, reached in curve if reached >= level), math.inf)


def rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a target and prior: medians over seeds, and units relative to those without a prior."""
    found = []
    for target in dict.fromkeys(one["target"] for one in runs):
        own = [one for one in runs if one["target"] == target]
        end = statistics.median(one["validation"] for one in own if one["prior"] == NONE)
        without: dict[float, float] = {}
        for prior in sorted({one["prior"] for one in own}, key=lambda name: (name != NONE, name)):
            seeds = [one for one in own if one["prior"] == prior]
            to = {
                level: statistics.median(units_to(one["curve"], level * end) for one in seeds)
                for level in LEVELS
            }
            without = without or to
            found.append(
                {
                    "target": target,
                    "prior": prior,
                    "seeds": len(seeds),
                    "units_to": {f"{level:.0%}": to[level] for level in LEVELS},
                    "relative": {f"{level:.0%}": to[level] / without[level] for level in LEVELS},
                    **{
                        name: statistics.median(one[name] for one in seeds)
                        for name in ("validation", "test", "trials", "from_earlier_on_front")
                    },
                }
            )
    return found


def show(table_rows: Sequence[dict[str, Any]], units: float) -> None:
    """Print the table."""
    table = Table(title=f"Units to a share of the hypervolume without a prior at {units:g} units (medians)")
    ends = ("validation", "test", "trials", "of the prior on the front")
    for heading in ("target", "prior", *(f"{level:.0%}" for level in LEVELS), *ends):
        table.add_column(heading, justify="left" if heading in ("target", "prior") else "right")
    for row in table_rows:
        cells = [
            "–" if math.isinf(to) else f"{to:.2f} ({row['relative'][level]:.2f}×)"
            for level, to in row["units_to"].items()
        ]
        ending = (f"{row['validation']:.3f}", f"{row['test']:.3f}", f"{row['trials']:g}")
        table.add_row(row["target"], row["prior"], *cells, *ending, f"{row['from_earlier_on_front']:g}")
    Console(width=120).print(table)


def main() -> None:
    """Run what is missing, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help=f"earlier:target, of {', '.join(DATASETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--units", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=Path("autopeft_runs/transfer"))
    given = parser.parse_args()
    pairs = [pair.partition(":")[::2] for pair in given.pairs]
    for earlier, target in pairs:
        if target not in DATASETS or earlier not in (*DATASETS, WRONG):
            parser.error(
                f"{earlier}:{target} is no pair: there are {', '.join(DATASETS)}, and earlier {WRONG}"
            )
    torch.set_num_threads(1)
    targets = dict.fromkeys(target for _, target in pairs)
    kept = given.folder / f"runs-{given.units:g}-units.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def once(name: str, make: Any) -> Any:
        if name not in done:
            done[name] = make()
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(done) + "\n")
        return done[name]

    def ran(name: str, search: Search, dataset: str) -> Any:
        unit = once(f"unit of {dataset}", lambda: unit_of(dataset))
        result = once(name, lambda: run(search, unit, given.units))
        print(f"{name}: {result['validation']:.3f}, test {result['test']:.3f}", flush=True)
        return result

    priors: dict[tuple[str, str], Path | None] = {(NONE, target): None for target in targets}
    for earlier, target in pairs:
        dataset = target if earlier == WRONG else earlier
        source = made(given.folder, dataset, _EARLIER_SEED)
        ran(source.name, source, dataset)
        priors[earlier, target] = made_wrong(source) if earlier == WRONG else source.folder
    runs = []
    for seed in range(given.seeds):
        for (earlier, target), prior in priors.items():
            name = f"{target}-from-{earlier}-{seed}"
            result = ran(name, made(given.folder, target, seed, prior, name), target)
            runs.append({"target": target, "prior": earlier, "seed": seed, **result})
    table = rows(runs)
    show(table, given.units)
    record = {
        "command": f"python -m benchmarks.transfer --pairs {' '.join(given.pairs)} --seeds {given.seeds} "
        f"--units {given.units:g}",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, 1 thread",
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
