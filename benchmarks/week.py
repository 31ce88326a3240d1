"""A simulated week: very many trials in one study, drawn at random, and what of it grows.

    python -m benchmarks.week [--trials 20000] [--workers 32] [--tracking]

The driver is a real search's (real backbone and data, journal on disk, trained tensors of the front, with
`--tracking` also MLflow on SQLite). Its executor trains nothing: of so many jobs at once, as workers on other
machines would have, a random one ends, with made-up values and tensors of the right size. Shown are the
trials a second that the driver asks, tells and records, processor time and resident memory by the part of the
study, the size of the folder, and how long a fresh process takes to resume it, to print its front and to
write its page and table.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from assets.prepare import prepare
from autopeft import ParetoFront, Search
from autopeft.core.evaluation import Cost, Evaluation, TrialRecord
from autopeft.core.jobs import Duplicate, Job, New
from autopeft.evaluation.executor import Executor
from autopeft.evaluation.run import Trained
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.methods.attachment import count_parameters
from autopeft.optimization.scheduler import Scheduler
from autopeft.optimization.study_store import StudyStore
from autopeft.reporting.console import wide_console
from autopeft.reporting.search_report import SearchReport
from autopeft.search_loop import FileCleanup
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.leak import resident_bytes
from benchmarks.machine import this_machine
from benchmarks.stopwatch import Places, Stopwatch

RESULTS = Path(__file__).parent / "results" / "week.json"
PARTS = 10
PLACES: Places = (
    ("ask", Scheduler, "next"),
    ("save tensors", AdapterCheckpoints, "save"),
    ("tell", StudyStore, "tell"),
    ("front", ParetoFront, "with_trial"),
    ("delete tensors", FileCleanup, "__call__"),
    ("show and track", SearchReport, "finished"),
)


@dataclass(frozen=True)
class NoWorkers:
    """Makes executors that train nothing.

    Attributes:
        workers: Jobs at once.
    """

    workers: int
    alters_trials = False

    def __call__(self, runner: TrialRunner) -> Executor:
        """Return an executor."""
        return _Untrained(runner, self.workers)


@dataclass
class _Untrained:
    runner: TrialRunner
    workers: int
    serves_hidden_states = False
    _jobs: list[Job] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def at_once(self) -> int:
        return self.workers

    @property
    def free(self) -> int:
        return self.workers - len(self._jobs)

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self) -> TrialRecord:
        job = self._jobs.pop(self._random.randrange(len(self._jobs)))
        if isinstance(job, Duplicate):
            return self.runner.run(job)
        assert isinstance(job, New), job
        return self.runner.recorded(job, self._trained(job))

    def close(self) -> None:
        self._jobs.clear()

    def _trained(self, job: New) -> Trained:
        parameters = count_parameters(self.runner.evaluator.backbone, job.configuration)
        draw = random.Random(job.configuration.key)
        lowest = job.configuration.lowest_block
        values = {
            "accuracy": min(0.99, 0.2 + 0.12 * math.log10(parameters) + draw.gauss(0, 0.03)),
            "trainable_parameters": float(parameters),
            "peak_memory": 2.0**28 * (2 - (lowest[1] if lowest else 6) / 6) + 12.0 * parameters,
        }
        evaluation = Evaluation(
            configuration=job.configuration,
            status="complete",
            values=values,
            cost=Cost(wall_seconds=30, cpu_seconds=30, steps=100),
            seed=self.runner.seed_of(job),
        )
        return Trained(evaluation, state={"all": torch.zeros(parameters)})


def week(folder: Path, workers: int, *, tracking: bool) -> Search:
    """Return the search."""
    return Search(
        str(prepare("minilm")),
        TextClassification(dataset=str(prepare("questions") / "questions.csv"), train_examples=512),
        PerLayer(methods=("lora", "series", "parallel", "prefix")),
        sampler="random",
        halving=None,
        seeds=1,
        derive=False,
        score_check=False,
        name="week",
        folder=folder,
        executor=NoWorkers(workers),
        tracking=f"sqlite:///{folder}/mlflow.db" if tracking else None,
    )


def run(folder: Path, trials: int, workers: int, *, tracking: bool) -> dict[str, Any]:
    """Run the study; return what it cost, by tenths of it."""
    search = week(folder, workers, tracking=tracking)
    search.validate()
    stopwatch = Stopwatch()
    tenths: list[dict[str, float]] = []
    last = time.perf_counter(), time.process_time(), 0
    step = max(1, trials // PARTS)
    before: dict[str, float] = {}

    def note(record: TrialRecord, front: ParetoFront) -> None:
        nonlocal last, before
        told = len(front.records)
        if told % step:
            return
        wall, processor, count = time.perf_counter(), time.process_time(), told - last[2]
        parts = {name: stopwatch.seconds[name] - before.get(name, 0.0) for name, *_ in PLACES}
        before = dict(stopwatch.seconds)
        tenths.append(
            {
                "trials": told,
                "front": len(front),
                "wall_ms": 1000 * (wall - last[0]) / count,
                "processor_ms": 1000 * (processor - last[1]) / count,
                "resident_mib": resident_bytes() / 2**20,
                **{f"{name}_ms": 1000 * seconds / count for name, seconds in parts.items()},
            }
        )
        last = wall, processor, told

    started = time.perf_counter(), time.process_time()
    last = *started, 0
    with stopwatch.watching(PLACES):
        front = search.run(trials=trials, progress=False, callbacks=[note])
    wall, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    files = [file for file in (folder / "week").rglob("*") if file.is_file()]
    return {
        "trials": trials,
        "trials_a_second": trials / wall,
        "trials_a_processor_second": trials / processor,
        "processor_seconds": processor,
        "front": len(front),
        "journal_mib": (folder / "week" / "study.log").stat().st_size / 2**20,
        "folder_mib": sum(file.stat().st_size for file in files) / 2**20,
        "tenths": tenths,
    }


def look(folder: Path, trials: int, workers: int, *, tracking: bool) -> dict[str, float]:
    """Return the seconds that this process takes to read the front, to report it, and to resume the study."""
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter(), time.process_time()
        yield
        seconds[f"{name}_seconds"] = time.perf_counter() - started[0]
        seconds[f"{name}_processor_seconds"] = time.process_time() - started[1]

    search = week(folder, workers, tracking=tracking)
    with timed("front"):
        front = search.front()
        assert repr(front)
    with timed("report"):
        front.report(folder)
        front.to_frame(all_trials=True).to_csv(folder / "trials.csv")
    search.validate()
    with timed("resume"):
        resumed = search.run(trials=trials, progress=False)
    assert len(resumed.records) == trials
    return seconds


def show(results: dict[str, Any]) -> None:
    """Print a row a tenth."""
    table = Table(title="A simulated week, by tenths")
    for name in results["tenths"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in results["tenths"]:
        table.add_row(*(f"{value:.0f}" if value >= 100 else f"{value:.2f}" for value in row.values()))
    console = wide_console()
    console.print(table)
    console.print_json(json.dumps({name: value for name, value in results.items() if name != "tenths"}))


def main() -> None:
    """Run the week, look at it from a fresh process, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--tracking", action="store_true", help="also write to MLflow")
    parser.add_argument("--look", type=Path, help="a folder with a week, to look at alone")
    arguments = parser.parse_args()
    options = {"trials": arguments.trials, "workers": arguments.workers, "tracking": arguments.tracking}
    torch.set_num_threads(1)
    if arguments.look is not None:
        print(json.dumps(look(arguments.look, **options)))
        return
    with tempfile.TemporaryDirectory() as name:
        results = run(Path(name), **options)
        command = [sys.executable, "-m", "benchmarks.week", *sys.argv[1:], "--look", name]
        looked = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results |= json.loads(looked.splitlines()[-1])
    show(results)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    flags = f"--trials {arguments.trials} --workers {arguments.workers}"
    command_line = f"python -m benchmarks.week {flags}" + (" --tracking" if arguments.tracking else "")
    known["with MLflow" if arguments.tracking else "without MLflow"] = {
        "command": command_line,
        "machine": this_machine(),
        **results,
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
