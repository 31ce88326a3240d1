"""Does a search grow? Resident memory over the trials of one process, on real weights and data.

    python -m benchmarks.leak [--trials 200]

Every trial attaches another configuration of LoRA, series and parallel adapters and prefixes to the resident
MiniLM, trains it for a few steps, validates, and logs to an MLflow database. Growth is from the mean of the
ten trials after the first 20 to the mean of the last ten: a single trial differs from the next by what its
adapters need. The line fitted through all trials after the first 20 says whether growth goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assets.prepare import prepare
from autopeft import ParetoFront, Search
from autopeft.core.evaluation import TrialRecord
from autopeft.search_spaces import PerLayer
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "leak.json"
WARM_UP = 20
WINDOW = 10
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def measure(trials: int) -> list[int]:
    """Search; return the resident memory after every trial, in bytes."""
    found: list[int] = []

    def note(record: TrialRecord, front: ParetoFront) -> None:
        found.append(resident_bytes())

    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            str(prepare("minilm")),
            DATASETS["questions"].task(train=64, validation=32, test=32),
            PerLayer(methods=("lora", "series", "parallel", "prefix")),
            training=Training(epochs=1, batch_size=16, max_steps=2, device="cpu"),
            halving=None,
            seeds=1,
            folder=folder,
            tracking=f"sqlite:///{folder}/mlflow.db",
        )
        search.run(trials=trials, progress=False, callbacks=[note])
    return found


def growth(memory: Sequence[int]) -> dict[str, Any]:
    """Return what resident memory was, in MiB, and its growth after the first `WARM_UP` trials.

    Raises:
        ValueError: There are fewer than `WARM_UP` + 2 · `WINDOW` trials.
    """
    if len(memory) < WARM_UP + 2 * WINDOW:
        raise ValueError(f"At least {WARM_UP + 2 * WINDOW} trials are needed, got {len(memory)}.")
    mib = [resident / 2**20 for resident in memory]
    warm = mib[WARM_UP:]
    first, last = statistics.fmean(warm[:WINDOW]), statistics.fmean(warm[-WINDOW:])
    slope, _ = statistics.linear_regression(range(len(warm)), warm)
    return {
        "trials": len(memory),
        "first_mib": mib[0],
        "after_warm_up_mib": first,
        "last_mib": last,
        "highest_mib": max(mib),
        "growth": last / first - 1,
        "slope_mib_a_100_trials": 100 * slope,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    memory = measure(arguments.trials)
    row = growth(memory)
    table = Table(title="Resident memory of one process (MiB)")
    for name in row:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(
        str(row["trials"]),
        *(f"{row[name]:.1f}" for name in list(row)[1:5]),
        f"{row['growth']:+.2%}",
        f"{row['slope_mib_a_100_trials']:+.1f}",
    )
    Console(width=120).print(table)
    record = {
        "command": f"python -m benchmarks.leak --trials {arguments.trials}",
        "machine": this_machine(),
        **row,
        "resident_mib": [round(resident / 2**20, 1) for resident in memory],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
