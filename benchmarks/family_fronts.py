"""Which adapter families reach a front in searches that have run, and how many trials reach nothing.

    python -m benchmarks.family_fronts FOLDER [FOLDER ...]

Each folder is that of a search over many families, as of `configs/families.yaml`. The table has of every
family how many trials had it, and how many of these are on the front; and of all trials, how many came to
nothing: failed, or at the trivial score or below, paused ones included. Their learning rate did that, mostly.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.optimization.study_store import load_study
from autopeft.reporting.console import wide_console
from autopeft.reporting.front import ParetoFront
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "family_fronts.json"


def trivial_trials(records: Iterable[TrialRecord], metric: Objective, trivial: float) -> int:
    """Return how many trials came to nothing: failed, or are not better than the trivial score."""
    evaluations = [record.evaluation for record in records]
    return sum(
        each.status == "failed"
        or (metric.name in each.values and not metric.is_better(each.values[metric.name], trivial))
        for each in evaluations
    )


def counted(folder: Path) -> dict[str, Any]:
    """Return what became of every family in one search."""
    attributes, records = load_study(folder)
    front = ParetoFront.stored(attributes, records)
    metric = front.metric
    trivial = next(axis.worst for axis in front.axes if axis.objective == metric)
    trained = [
        record
        for record in front.records
        if record.derived_from is None
        and record.duplicate_of is None
        and len(record.evaluation.configuration)
    ]
    return {
        "search": folder.name,
        "metric": metric.name,
        "trials": len(trained),
        "at the trivial score": trivial_trials(trained, metric, trivial),
        "hypervolume": front.hypervolume,
        "tried": Counter(name for record in trained for name in record.evaluation.configuration.methods),
        "on the front": Counter(name for point in front for name in point.configuration.methods),
    }


def main() -> None:
    """Count, print the table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    searches = [counted(folder) for folder in parser.parse_args().folders]
    table = Table("family", *(f"{search['search']}: on the front / trials" for search in searches))
    tried = sum((search["tried"] for search in searches), Counter[str]())
    for name, _ in tried.most_common():
        table.add_row(
            name, *(f"{search['on the front'][name]} / {search['tried'][name]}" for search in searches)
        )
    at_trivial = (f"{search['at the trivial score']} / {search['trials']}" for search in searches)
    table.add_row("at the trivial score", *at_trivial)
    wide_console().print(table)
    record = {"machine": this_machine(), "searches": searches}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
