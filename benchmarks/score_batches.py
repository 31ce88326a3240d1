"""How many training batches scores take: rank correlation with what sixteen give, and processor time.

    python -m benchmarks.score_batches [--batches 1 2 4 8] [--seeds 3]

MiniLM on three data sets, batch size 16, those of the cheap scores that read data; the time is that of all. A
seed draws the head and the batches, of which a smaller number takes the first. Figures are means over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft.evaluation.site_scoring import SCORE_BATCHES, score_sites
from autopeft.sensitivity import CHEAP_SCORES, SiteScores
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.rivals.setting import Setting
from benchmarks.scoring import agreement

RESULTS = Path(__file__).parent / "results" / "score_batches.json"
MOST = 16
READ_DATA = (
    "gradient_norm",
    "fisher",
    "snip",
    "taylor2",
    "gora",
    "gradient_spectrum",
    "explained_variance",
)


def scored(setting: Setting, batches: int) -> tuple[Mapping[str, SiteScores], float]:
    """Return the scores from so many batches, and the processor seconds they took."""
    evaluator = setting.evaluator(setting.load())
    started = time.process_time()
    scores = score_sites(evaluator, CHEAP_SCORES, batches=batches)
    return scores, time.process_time() - started


def measure(dataset: str, numbers: Sequence[int], seeds: int) -> list[dict[str, Any]]:
    """Return a row for each number of batches."""
    rows = []
    settings = [Setting(dataset=dataset, seed=seed, trials=1) for seed in range(seeds)]
    whole = [scored(setting, MOST) for setting in settings]
    for number in (*numbers, MOST):
        several = whole if number == MOST else [scored(setting, number) for setting in settings]
        found = [agreement(few, sixteen) for (few, _), (sixteen, _) in zip(several, whole, strict=True)]
        rows.append(
            {
                "dataset": dataset,
                "batches": number,
                "processor_seconds": statistics.fmean(seconds for _, seconds in several),
                "correlation": {name: [correlations[name] for correlations in found] for name in READ_DATA},
            }
        )
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each data set."""
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        several = [row for row in rows if row["dataset"] == dataset]
        table = Table(title=f"{dataset}: rank correlation with the scores from {MOST} batches")
        for heading in ("batches", *(str(row["batches"]) for row in several)):
            table.add_column(heading, justify="left" if heading == "batches" else "right")
        for name in READ_DATA:
            cells = (f"{statistics.fmean(row['correlation'][name]):.3f}" for row in several)
            table.add_row(name, *cells)
        table.add_row("CPU-seconds", *(f"{row['processor_seconds']:.1f}" for row in several))
        Console(width=110).print(table)
    print(f"A search takes {SCORE_BATCHES}.")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in DATASETS for row in measure(name, arguments.batches, arguments.seeds)]
    show(rows)
    batches = " ".join(map(str, arguments.batches))
    record = {
        "command": f"python -m benchmarks.score_batches --batches {batches} --seeds {arguments.seeds}",
        "machine": this_machine("one thread"),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
