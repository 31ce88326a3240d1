"""What a trial costs beside training: ask, attach, count, set training up, tell, save, track.

    python -m benchmarks.overhead [--trials 1000] [--samplers ehvi tpe]

Runs a real search (real backbone and data, journal on disk, MLflow on SQLite) in which training is a no-op
that returns a seeded score. Times are the whole run's, what MLflow is behind with at its end included: wall
time, and processor time of the whole process, which depends less on what else the machine does. The parts
are the main thread's processor time, and "write runs" that of the thread that writes to MLflow. Computing the
hidden states of frozen blocks, once a cut, is forward passes that training is spared: it is shown, and not
part of the figures. The rival is asking and telling alone, with Optuna's own SQLite storage written parameter
by parameter, as a hand-written loop has it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import torch
from lightning.pytorch import Trainer
from rich.table import Table

import autopeft.evaluation.run
from assets.prepare import prepare
from autopeft import ParetoFront, Search
from autopeft.callbacks import BestWeights
from autopeft.core.evaluation import TrialRecord
from autopeft.evaluation.frozen_blocks.cache import HiddenStateCache
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.methods import Attachment
from autopeft.optimization.scheduler import Scheduler
from autopeft.optimization.study_store import StudyStore
from autopeft.reporting.console import wide_console
from autopeft.reporting.mlflow.worker import Worker
from autopeft.reporting.search_report import SearchReport
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.module import FineTuning
from benchmarks.machine import this_machine
from benchmarks.stopwatch import Places, Stopwatch

RESULTS = Path(__file__).parent / "results" / "overhead.json"
LIMIT_MILLISECONDS = 400  # of the default sampler
PLACES: Places = (
    ("ask", Scheduler, "next"),
    ("attach", Attachment, "__init__"),
    ("attach", Attachment, "detach"),
    ("open hidden states", HiddenStateCache, "open"),
    ("compute hidden states", HiddenStateCache, "_filled"),
    ("count", MemoryCounter, "count"),
    ("set training up", autopeft.evaluation.run.EvaluationRun, "_train"),
    ("tell", StudyStore, "tell"),
    ("save", AdapterCheckpoints, "save"),
    ("save", AdapterCheckpoints, "keep_only"),
    ("track", SearchReport, "_track"),
)
WRITE = "write runs"
SPARED = "compute hidden states"


def untrained(trainer: Trainer, module: FineTuning, evaluator: Any, best: BestWeights, seed: int) -> None:
    """Stand in for the fit: log a score that depends on the attached parameters' number."""
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    score = torch.tensor(min(0.95, 0.3 + 0.04 * trainable**0.2 + random.Random(trainable).gauss(0, 0.02)))
    best.metrics = {metric.name: float(score) for metric in evaluator.task.metrics}


class Overhead:
    """A search of so many trials, and what each of them cost.

    Attributes:
        wall: Seconds of each trial; like the others without the computing of hidden states.
        processor: Processor seconds of the whole process during each trial.
        whole_wall: Seconds of the whole run.
        whole_processor: Processor seconds of the whole run.
        parts: Processor seconds by part of the whole run, the computing of hidden states among them.
    """

    def __init__(self, folder: Path, trials: int, sampler: str) -> None:
        task = TextClassification(dataset=str(prepare("questions") / "questions.csv"), train_examples=512)
        search = Search(
            str(prepare("minilm")),
            task,
            PerLayer(methods=("lora", "series", "parallel", "prefix")),
            sampler=sampler,
            halving=None,
            seeds=1,
            folder=folder,
            tracking=f"sqlite:///{folder}/mlflow.db",
        )
        search.validate()
        search.run(trials=1, progress=False)  # creates the tracking store
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.trials = trials
        stopwatch = Stopwatch()
        work = Worker.run
        last = 0.0, 0.0

        def note(record: TrialRecord, front: ParetoFront) -> None:
            nonlocal last
            now = clocks()
            self.wall.append(now[0] - last[0])
            self.processor.append(now[1] - last[1])
            last = now

        def clocks() -> tuple[float, float]:
            wall, processor = time.perf_counter(), time.process_time()
            return wall - stopwatch.wall[SPARED], processor - stopwatch.seconds[SPARED]

        def timed_work(worker: Worker) -> None:
            work(worker)
            stopwatch.seconds[WRITE] = time.thread_time()

        with (
            patch.object(Worker, "run", timed_work),
            stopwatch.watching(PLACES),
        ):
            last = clocks()
            wall, processor = last
            search.run(trials=trials, progress=False, callbacks=[note])
            ended = clocks()
        self.whole_wall, self.whole_processor = ended[0] - wall, ended[1] - processor
        self.parts = {name: stopwatch.seconds[name] for name in dict.fromkeys(part for part, *_ in PLACES)}
        self.parts |= {WRITE: stopwatch.seconds[WRITE]}
        known = sum(seconds for name, seconds in self.parts.items() if name != SPARED)
        self.parts["start and end"] = self.whole_processor - known

    def summary(self) -> dict[str, Any]:
        """Return milliseconds a trial: the means, those of the last tenth, the parts, and the slope."""
        processor = 1000 * np.array(self.processor)
        slope = np.polyfit(np.arange(len(processor)), processor, 1)[0] if len(processor) > 1 else 0.0
        return {
            "trials": self.trials,
            "mean_ms": 1000 * self.whole_wall / self.trials,
            "last_tenth_ms": 1000 * mean_of_last_tenth(self.wall),
            "processor_mean_ms": 1000 * self.whole_processor / self.trials,
            "processor_first_tenth_ms": 1000
            * mean_of_last_tenth(self.processor[: len(self.processor) // 10]),
            "processor_last_tenth_ms": 1000 * mean_of_last_tenth(self.processor),
            "processor_slope_ms_a_1000_trials": 1000 * float(slope),
            "parts_ms": {name: 1000 * seconds / self.trials for name, seconds in self.parts.items()},
        }


def mean_of_last_tenth(seconds: Sequence[float]) -> float:
    """Return the mean over the last tenth."""
    return float(np.mean(seconds[-max(1, len(seconds) // 10) :])) if seconds else 0.0


def rival(folder: Path, trials: int) -> dict[str, Any]:
    """Ask and tell with Optuna's SQLite storage alone, and return what a trial costs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/rival.db",
        directions=["maximize", "minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=0),
    )
    wall, processor = [], []
    for number in range(trials):
        started = time.perf_counter(), time.process_time()
        trial = study.ask()
        for index in range(60):
            trial.suggest_categorical(f"{index}.method", ["off", "lora", "series", "prefix"])
            trial.suggest_int(f"{index}.rank", 1, 64, log=True)
        study.tell(trial, [random.Random(number).random(), number, number])
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return {
        "trials": trials,
        "mean_ms": 1000 * float(np.mean(wall)),
        "last_tenth_ms": 1000 * mean_of_last_tenth(wall),
        "processor_mean_ms": 1000 * float(np.mean(processor)),
        "processor_last_tenth_ms": 1000 * mean_of_last_tenth(processor),
    }


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the results, and the parts of each search."""
    table = Table(title=f"Milliseconds a trial, training replaced by a no-op (limit {LIMIT_MILLISECONDS})")
    columns = {
        "trials": "trials",
        "wall": "mean_ms",
        "wall, last tenth": "last_tenth_ms",
        "processor": "processor_mean_ms",
        "first tenth": "processor_first_tenth_ms",
        "last tenth": "processor_last_tenth_ms",
        "slope a 1,000 trials": "processor_slope_ms_a_1000_trials",
    }
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    for name, result in results.items():
        cells = (f"{result[key]:.0f}" if key in result else "" for key in columns.values())
        table.add_row(name, *cells)
    console = wide_console()
    console.print(table)
    searches = {name: summary["parts_ms"] for name, summary in results.items() if "parts_ms" in summary}
    parts = Table(title="Processor milliseconds a trial, by part")
    for heading in ("", *searches):
        parts.add_column(heading, justify="right" if heading else "left")
    for part in next(iter(searches.values()), ()):
        parts.add_row(part, *(f"{times[part]:.1f}" for times in searches.values()))
    console.print(parts)


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samplers", nargs="+", default=["ehvi", "tpe"])
    arguments = parser.parse_args()
    trials = arguments.trials
    autopeft.evaluation.run._fit = untrained
    results: dict[str, Mapping[str, Any]] = {}
    for sampler in arguments.samplers:
        with tempfile.TemporaryDirectory() as folder:
            results[f"autopeft, {sampler}"] = Overhead(Path(folder), trials, sampler).summary()
    with tempfile.TemporaryDirectory() as folder:
        name = "Optuna TPE on SQLite, 120 parameters, ask and tell alone"
        results[name] = rival(Path(folder), min(trials, 30))
    show(results)
    RESULTS.parent.mkdir(exist_ok=True)
    names = " ".join(arguments.samplers)
    command = f"python -m benchmarks.overhead --trials {trials} --samplers {names}"
    record = {"command": command, "machine": this_machine(), "results": results}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
