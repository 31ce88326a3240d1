"""Trials an hour of two single-thread Ray workers against one, and whether they give the same values.

    python -m benchmarks.workers [--trials 24] [--rows 1024] [--seed 0]

The demo's model, data and training, with trials that do not depend on the order in which they finish: drawn
at random, each trained once to its end. The time is that from the workers' start, when they have their
backbones and data, to the last trial; at the end one worker of two waits for the other. Each search has a
cache of hidden states of its own, which its workers share.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from assets.prepare import prepare
from autopeft import RayExecutor, Search, Training
from autopeft.evaluation.executor import Executor
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.reporting.console import wide_console
from autopeft.tasks import TextClassification
from benchmarks.machine import this_machine
from benchmarks.worker_faults import Executors
from tests.learnable import outcomes

RESULTS = Path(__file__).parent / "results" / "workers.json"
GOAL = 1.7


def searched(workers: int, trials: int, rows: int, seed: int) -> tuple[list[Any], float, float]:
    """Return what came of each trial, the seconds that the trials took, and those that workers' start did."""
    ready = 0.0

    def executor(runner: TrialRunner) -> Executor:
        nonlocal ready
        made = RayExecutor(workers=workers)(runner)
        ready = time.monotonic()
        return made

    with tempfile.TemporaryDirectory() as folder:
        os.environ["AUTOPEFT_CACHE"] = folder
        task = TextClassification(
            dataset=str(prepare("questions") / "questions.csv"),
            train_examples=rows,
            validation_examples=500,
            test_examples=500,
        )
        search = Search(
            str(prepare("minilm")),
            task,
            training=Training(epochs=3, batch_size=32),
            sampler="random",
            halving=None,
            seeds=1,
            seed=seed,
            tracking=None,
            folder=folder,
            executor=Executors(executor),
        )
        search.validate()
        ended = [time.monotonic()]
        front = search.run(
            trials=trials, progress=False, callbacks=[lambda *_: ended.append(time.monotonic())]
        )
    records = sorted(front.records, key=lambda record: record.number)
    return outcomes(records), ended[-1] - ready, ready - ended[0]


def main() -> None:
    """Search twice, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--rows", type=int, default=1024, help="to train on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = arguments.trials, arguments.rows, arguments.seed
    found = {workers: searched(workers, *settings) for workers in (1, 2)}
    table = Table(title=f"{arguments.trials} trials of the demo by single-thread workers")
    for heading in ("workers", "trials an hour", "seconds to start"):
        table.add_column(heading, justify="right")
    rates = {workers: 3600 * arguments.trials / seconds for workers, (_, seconds, _) in found.items()}
    for workers, (*_, start) in found.items():
        table.add_row(str(workers), f"{rates[workers]:.0f}", f"{start:.0f}")
    wide_console().print(table)
    equal = sum(first == other for first, other in zip(found[1][0], found[2][0], strict=True))
    print(f"{rates[2] / rates[1]:.2f} times the trials (goal: {GOAL}); {equal} trials have the same values.")
    flags = f"--trials {arguments.trials} --rows {arguments.rows} --seed {arguments.seed}"
    record = {
        "command": f"python -m benchmarks.workers {flags}",
        "machine": this_machine(),
        "cores": os.cpu_count(),
        "trials_an_hour": rates,
        "ratio": rates[2] / rates[1],
        "trials_of_equal_values": equal,
        "start_seconds": {workers: start for workers, (*_, start) in found.items()},
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
