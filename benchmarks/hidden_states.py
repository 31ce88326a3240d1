"""What leaving the frozen blocks out of training steps saves: hidden states served against computed.

    python -m benchmarks.hidden_states [--steps 80] [--threads 1] [--parts steps trials scores]

MiniLM on question classification, LoRA of rank 8 on query and value of all blocks from the cut up. First the
training step: on each batch one step with the frozen blocks run in evaluation mode and one with hidden
states served, in turn, in one process; medians of CPU seconds. With L blocks and the cut k a step takes
2L - k passes of a block, served 2(L - k): the ratio of the two is the theoretical speed-up. Then whole
trials, validations and Lightning included: one that computes the hidden states first, and one that finds
them. Last what leaving out the dropout below the cut does to the accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from assets.prepare import prepare
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.frozen_blocks.cache import HiddenStateCache
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.training.module import Serve
from autopeft.training.settings import FrozenBlocksMode, Training
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "hidden_states.json"
BATCH_SIZE = 32
EPOCHS = 3
REPEATS = 3
WARM_UP = 3
PARTS = ("steps", "trials", "scores")
CUTS = (3, 4, 5)  # L/2, 2L/3 and 5L/6 of MiniLM's six blocks
STEP_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "cut": ("cut", "d", 1),
    "computed_seconds": ("computed", ".1f", 1e3),
    "served_seconds": ("served", ".1f", 1e3),
    "gather_seconds": ("of it putting in place", ".2f", 1e3),
    "ratio": ("ratio", ".2f", 1),
    "theory": ("theory", ".2f", 1),
}
TRIAL_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "cut": ("cut", "d", 1),
    "computed_seconds": ("computed", ".2f", 1),
    "filling_seconds": ("served, filling", ".2f", 1),
    "served_seconds": ("served", ".2f", 1),
    "saved_share": ("saved %", ".0f", 100),
    "saved_share_estimated": ("as estimated %", ".0f", 100),
}
SCORE_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "cut": ("cut", "d", 1),
    "train_accuracy": ("dropout everywhere", ".4f", 1),
    "eval_accuracy": ("none below the cut", ".4f", 1),
    "difference": ("difference", "+.4f", 1),
    "standard_error": ("its standard error", ".4f", 1),
}
COLUMNS = {"steps": STEP_COLUMNS, "trials": TRIAL_COLUMNS, "scores": SCORE_COLUMNS}


def lora_above(cut: int, blocks: int) -> Configuration:
    """Return LoRA of rank 8 on query and value of all blocks from the cut up."""
    sites = [Site(block, role) for block in range(cut, blocks) for role in ("query", "value")]
    return Configuration(dict.fromkeys(sites, Adapter("lora", 8)))


def build(folder: Path, mode: FrozenBlocksMode, *, rows: int) -> Evaluator:
    """Return an evaluator of MiniLM on question classification."""
    task = DATASETS["questions"].task(train=rows, validation=500, test=100)
    training = Training(
        epochs=EPOCHS, batch_size=BATCH_SIZE, device="cpu", precision="32-true", frozen_blocks=mode
    )
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    backbone = Backbone.load(str(prepare("minilm")), task.head)
    return Evaluator(backbone, task, training, objectives, cache=folder)


def step_times(evaluator: Evaluator, cut: int, steps: int) -> dict[str, Any]:
    """Time training steps at one cut with and without serving, in turn."""
    blocks = len(evaluator.backbone.blocks)
    configuration = lora_above(cut, blocks)
    seconds: dict[str, list[float]] = {"computed": [], "served": []}
    gather: list[float] = []
    with (
        attach(evaluator.backbone, configuration) as attachment,
        evaluator.hidden_states.below(attachment),
    ):
        evaluator.hidden_states.open()
        ways: dict[str, Serve] = {"computed": contextlib.nullcontext, "served": evaluator.hidden_states.serve}
        module = evaluator.module(configuration)
        module.train()
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad], lr=1e-3
        )
        loader = evaluator.data.train_dataloader()
        batches = islice((batch for _ in cycle([0]) for batch in loader), steps + WARM_UP)
        for index, batch in enumerate(batches):
            for name, serve in ways.items():
                module.serve = serve
                taken = timed(partial(step, module, batch, optimizer))
                if index >= WARM_UP:
                    seconds[name].append(taken)
            gather.append(timed(partial(enter, evaluator.hidden_states, batch)))
        evaluator.backbone.model.eval()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    theory = (2 * blocks - cut) / (2 * (blocks - cut))
    ratio = medians["computed"] / medians["served"]
    return {
        "cut": cut,
        "blocks": blocks,
        **{f"{name}_seconds": value for name, value in medians.items()},
        "gather_seconds": statistics.median(gather),
        "ratio": ratio,
        "theory": theory,
        "of_theory": ratio / theory,
    }


def step(module: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Train on one batch, in Lightning's order."""
    loss = module.training_step(batch, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def enter(hidden_states: HiddenStateCache, batch: dict[str, Tensor]) -> None:
    """Get a batch's hidden states in place, and run nothing."""
    with hidden_states.serve(batch):
        pass


def timed(act: Callable[[], None]) -> float:
    """Return the CPU seconds of a call."""
    started = time.process_time()
    act()
    return time.process_time() - started


def trial_times(evaluators: Mapping[FrozenBlocksMode, Evaluator], folder: Path, cut: int) -> dict[str, Any]:
    """Time whole trials at one cut: computed, served with filling, served from files that are there."""
    blocks = len(evaluators["eval"].backbone.blocks)
    configuration = lora_above(cut, blocks)
    seconds: dict[str, list[float]] = {"computed": [], "filling": [], "served": []}
    gains = []
    for _ in range(REPEATS):
        cached = evaluators["cached"]
        for name, evaluator in (("computed", evaluators["eval"]), ("filling", cached), ("served", cached)):
            if name == "filling":
                shutil.rmtree(folder / "hidden_states", ignore_errors=True)
            evaluation = evaluator.evaluate(configuration)
            assert evaluation.status == "complete", evaluation.reason
            seconds[name].append(evaluation.cost.cpu_seconds)
            if name == "served":
                gains.append(cached.hidden_states.uses[-1])
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "cut": cut,
        **{f"{name}_seconds": value for name, value in medians.items()},
        "saved_share": 1 - medians["served"] / medians["computed"],
        "saved_share_when_filling": 1 - medians["filling"] / medians["computed"],
        "saved_share_estimated": gains[0].estimated_share,
    }


def scores(evaluators: Mapping[FrozenBlocksMode, Evaluator], cut: int, seeds: int) -> dict[str, Any]:
    """Compare the best validation accuracy with and without dropout below the cut."""
    configuration = lora_above(cut, len(evaluators["eval"].backbone.blocks))
    found: dict[str, Any] = {"cut": cut}
    modes: tuple[FrozenBlocksMode, ...] = ("train", "eval")
    for mode in modes:
        values = [evaluators[mode].evaluate(configuration, seed).values["accuracy"] for seed in range(seeds)]
        found[f"{mode}_accuracy"] = statistics.mean(values)
        found[f"{mode}_accuracies"] = values
    differences = [b - a for a, b in zip(found["train_accuracies"], found["eval_accuracies"], strict=True)]
    found["difference"] = statistics.mean(differences)
    found["standard_error"] = statistics.stdev(differences) / seeds**0.5
    return found


def main() -> None:
    """Measure, print tables, write JSON; parts that are not asked for keep their last result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    command = (
        f"python -m benchmarks.hidden_states --steps {arguments.steps} --rows {arguments.rows} "
        f"--threads {arguments.threads} --seeds {arguments.seeds} --parts"
    )
    record["machine"] = this_machine(f"{arguments.threads} thread(s)")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        modes: tuple[FrozenBlocksMode, ...] = ("train", "eval", "cached")
        evaluators = {mode: build(folder, mode, rows=arguments.rows) for mode in modes}
        measure: dict[str, Callable[[int], dict[str, Any]]] = {
            "steps": lambda cut: step_times(evaluators["cached"], cut, arguments.steps),
            "trials": lambda cut: trial_times(evaluators, folder, cut),
            "scores": lambda cut: scores(evaluators, cut, arguments.seeds),
        }
        for part in arguments.parts:
            record[part] = {"command": f"{command} {part}", "rows": [measure[part](cut) for cut in CUTS]}
    titles = {
        "steps": "A training step, median CPU ms",
        "trials": f"A trial of {EPOCHS} epochs, median CPU s of {REPEATS}",
        "scores": f"Best validation accuracy, mean of {arguments.seeds} seeds",
    }
    for part in arguments.parts:
        show(titles[part], record[part]["rows"], COLUMNS[part])
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def show(title: str, rows: list[dict[str, Any]], columns: Mapping[str, tuple[str, str, float]]) -> None:
    """Print some of the figures as a table."""
    table = Table(title=title)
    for heading, _, _ in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{row[key] * scale:{form}}" for key, (_, form, scale) in columns.items()))
    Console().print(table)


if __name__ == "__main__":
    main()
