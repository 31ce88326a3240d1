"""What a trial costs beside training: ask, attach, count, detach, tell, record, log.

    python -m benchmarks.overhead [--trials 500] [--samplers tpe nsga2 random]

Runs a real search (real backbone and data, journal on disk, MLflow on SQLite) in which training is a
no-op that returns a seeded score, and times the parts of each trial. The rival is the same search with
Optuna's own SQLite storage written parameter by parameter, as a hand-written loop has it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

import autopeft.evaluation_run
from assets.prepare import prepare
from autopeft import Search
from autopeft.callbacks import BestWeights
from autopeft.configuration import Configuration
from autopeft.search_spaces import PerLayer
from autopeft.tasks import TextClassification
from autopeft.training import FineTuning

RESULTS = Path(__file__).parent / "results" / "overhead.json"
LIMIT_MILLISECONDS = 150


def untrained(trainer: Trainer, module: FineTuning, evaluator: Any, best: BestWeights, seed: int) -> None:
    """Stand in for the fit: log a score that depends on the attached parameters' number."""
    trainable = sum(one.numel() for one in module.parameters() if one.requires_grad)
    score = torch.tensor(min(0.95, 0.3 + 0.04 * trainable**0.2 + random.Random(trainable).gauss(0, 0.02)))
    best.metrics = {name: float(score) for name in evaluator.task.metrics}


def run_search(folder: Path, trials: int, sampler: str) -> tuple[list[float], float]:
    """Return the seconds of every trial, and of the whole run, what is written at its end included."""
    task = TextClassification(dataset=str(prepare("questions") / "questions.csv"), train_examples=512)
    search = Search(
        str(prepare("minilm")),
        task,
        PerLayer(methods=("lora", "series", "parallel", "prefix")),
        sampler=sampler,
        folder=folder,
        tracking=f"sqlite:///{folder}/mlflow.db",
        score_check=False,
    )
    search.validate()
    search.run(trials=1, progress=False)  # creates the tracking store
    seconds = []
    evaluator = search.evaluator
    train = evaluator.train
    last = time.perf_counter()

    def timed(configuration: Configuration, *rest: Any, **options: Any) -> Any:
        nonlocal last
        outcome = train(configuration, *rest, **options)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
        return outcome

    evaluator.train = timed  # type: ignore[method-assign]
    started = last = time.perf_counter()
    search.run(trials=trials, progress=False)
    return seconds, time.perf_counter() - started


def rival(folder: Path, trials: int) -> list[float]:
    """Return the seconds a trial of asking and telling with Optuna's SQLite storage alone."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/rival.db",
        directions=["maximize", "minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=0),
    )
    seconds = []
    for number in range(trials):
        started = time.perf_counter()
        trial = study.ask()
        for index in range(60):
            trial.suggest_categorical(f"{index}.method", ["off", "lora", "series", "prefix"])
            trial.suggest_int(f"{index}.rank", 1, 64, log=True)
        study.tell(trial, [random.Random(number).random(), number, number])
        seconds.append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float], whole: float, trials: int) -> Mapping[str, float]:
    """Return the whole run's time a trial, and the mean of the last tenth, in milliseconds."""
    tail = seconds[-max(1, len(seconds) // 10) :]
    return {
        "mean_ms": 1000 * whole / trials,
        "last_tenth_ms": 1000 * sum(tail) / len(tail),
        "trials": float(trials),
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--samplers", nargs="+", default=["tpe", "nsga2", "random"])
    arguments = parser.parse_args()
    trials = arguments.trials
    autopeft.evaluation_run._fit = untrained
    results: dict[str, Mapping[str, float]] = {}
    for sampler in arguments.samplers:
        with tempfile.TemporaryDirectory() as folder:
            results[f"autopeft, {sampler}"] = summary(*run_search(Path(folder), trials, sampler), trials)
    with tempfile.TemporaryDirectory() as folder:
        seconds = rival(Path(folder), min(trials, 30))
        results["Optuna TPE on SQLite, 120 parameters, ask and tell alone"] = summary(
            seconds, sum(seconds), len(seconds)
        )
    table = Table(title=f"Overhead a trial, training replaced by a no-op (limit {LIMIT_MILLISECONDS} ms)")
    for heading in ("", "trials", "mean", "last tenth"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in results.items():
        table.add_row(
            name, f"{one['trials']:.0f}", f"{one['mean_ms']:.0f} ms", f"{one['last_tenth_ms']:.0f} ms"
        )
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    names = " ".join(arguments.samplers)
    command = f"python -m benchmarks.overhead --trials {trials} --samplers {names}"
    record = {"command": command, "machine": platform.platform(), "results": results}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
