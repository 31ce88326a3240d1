"""Which multiple of LoRA's learning rate suits each family.

    python -m benchmarks.family_rates [--families NAME ...]

Each family sits alone on all its sites in the top half of three backbones: MiniLM on questions (accuracy), a
small T5 on pronunciations (loss), Whisper on spoken commands (accuracy). The configuration's learning rate,
which the head has too, is the best of LoRA's there; the family's own parameters have a multiple of it, tried
in steps of √10 from the prior of `MethodSpec.rate` uphill. What is compared is the mean over the tasks of the
share of what LoRA gains over a training without adapters. Trainings are kept in
`results/family_rates_trainings.jsonl`, and none is repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft.core.configuration import Adapter, Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import Attachment
from autopeft.methods.attachment import obstacle
from autopeft.methods.base import RATE
from autopeft.models.backbone import Backbone
from autopeft.search_spaces.method_space import in_top_half
from autopeft.yaml_config import load_config
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results" / "family_rates.json"
TRAININGS = RESULTS.with_name("family_rates_trainings.jsonl")
TASKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "questions": ("configs/families.yaml", ()),
    "commands": (
        "configs/speech_commands.yaml",
        ("training.epochs=3", "task.train_examples=160", "task.validation_examples=120"),
    ),
    "pronunciations": (
        "configs/pronunciations.yaml",
        ("task.generate=[]", "objectives=[loss, trainable_parameters]", "task.train_examples=1024"),
    ),
}
LORA_RATES = (1e-3, 10**-2.5, 1e-2)
_LARGEST_STEP, _SMALLEST_STEP = 6, -3  # of √10
_RANK = 8
_NOWHERE = "no site takes it"


def evaluator(task: str) -> Evaluator:
    """Return what trains on a task."""
    config, overrides = TASKS[task]
    search = load_config(config, ["tracking=null", *overrides]).search
    backbone = Backbone.load(str(search.backbone), search.task.head, options=search.loading)
    training = replace(search.training, device="cpu", precision="32-true")
    made = Evaluator(
        backbone,
        search.task,
        training,
        resolve_objectives((search.task.metrics[0].name, "trainable_parameters"), search.task.objectives),
    )
    made.hidden_states.expect(1000)
    return made


def placed(backbone: Backbone, method: str, rate: float) -> Configuration:
    """Return a family of a middle size on all sites of the top half that take it."""
    specification = METHOD_SPECS[method]
    low, high = specification.sizes
    size = max(low, min(_RANK, high)) if specification.size_name else None
    sites = {
        site: Adapter(method, size)
        for site, shape in backbone.sites.items()
        if in_top_half(site.place, backbone) and shape.kind in specification.kinds
    }
    taken = {site: each for site, each in sites.items() if obstacle(backbone, site, each) is None}
    return Configuration(taken, learning_rate=rate)


@cache
def at_multiple(multiple: float) -> type[Attachment]:
    """Return an attachment whose adapters are trained at a multiple of the configuration's rate."""

    class AtMultiple(Attachment):
        def _attach_methods(self) -> None:
            super()._attach_methods()
            for parameter in self.parameters.values():
                setattr(parameter, RATE, multiple)

    return AtMultiple


class Trainings:
    """Scores of trainings, kept in a file."""

    def __init__(self) -> None:
        lines = TRAININGS.read_text().splitlines() if TRAININGS.exists() else []
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._known = {(each["task"], each["family"], each["rate"], each["step"]): each for each in found}
        self.evaluator: Callable[[str], Evaluator] = cache(evaluator)

    def score(self, task: str, family: str, rate: float, step: int) -> dict[str, Any]:
        """Return the score of a family whose multiple is so many steps of √10; of no adapters for ""."""
        key = (task, family, rate, step)
        if key not in self._known:
            bench = self.evaluator(task)
            placement = (
                placed(bench.backbone, family, rate) if family else Configuration({}, learning_rate=rate)
            )
            evaluation = bench.train(placement, attachment=at_multiple(10 ** (step / 2))).evaluation
            found = {
                **dict(zip(("task", "family", "rate", "step"), key, strict=True)),
                "score": evaluation.values.get(bench.monitor.name),
                "failure": evaluation.reason if len(placement) or not family else _NOWHERE,
                "cpu_seconds": round(evaluation.cost.cpu_seconds, 1),
            }
            print(json.dumps(found), flush=True)
            with TRAININGS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            self._known[key] = found
        return self._known[key]

    def lora(self, task: str) -> tuple[float, float, float]:
        """Return LoRA's best rate on a task, the score without adapters at that rate, and what LoRA gains."""
        found = [
            (rate, self.score(task, "", rate, 0)["score"], self.score(task, "lora", rate, 0)["score"])
            for rate in LORA_RATES
        ]
        sign = 1 if self.evaluator(task).monitor.direction == "maximize" else -1
        rate, nothing, score = max(found, key=lambda scores: sign * scores[2])
        return rate, nothing, score - nothing

    def gain(self, family: str, step: int) -> float:
        """Return a family's share of LoRA's gain: the mean over the tasks, 0 where a training failed."""
        shares = []
        for task in TASKS:
            rate, nothing, gain = self.lora(task)
            found = self.score(task, family, rate, step)
            if found["failure"] is None:
                shares.append((found["score"] - nothing) / gain)
            elif found["failure"] != _NOWHERE:
                shares.append(0.0)
        return statistics.fmean(shares) if shares else math.nan

    def climb(self, family: str) -> dict[int, float]:
        """Return the gain by steps, tried uphill from the family's prior."""
        start = round(2 * math.log10(METHOD_SPECS[family].rate))
        gains = {start: self.gain(family, start)}
        for direction in (1, -1):
            step = start
            while _SMALLEST_STEP < step < _LARGEST_STEP:
                step += direction
                gains[step] = self.gain(family, step)
                if not gains[step] > gains[step - direction]:
                    break
        return dict(sorted(gains.items()))


def main() -> None:
    """Train, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(METHOD_SPECS), default=list(METHOD_SPECS))
    families = parser.parse_args().families
    trainings = Trainings()
    table = Table("family", "prior", "best", "share of LoRA's gain by multiple")
    rows: dict[str, Any] = {}
    for family in families:
        gains = {10 ** (step / 2): gain for step, gain in trainings.climb(family).items()}
        best = max(gains, key=lambda multiple: gains[multiple])
        rows[family] = {"prior": METHOD_SPECS[family].rate, "best": best, "gains": gains}
        told = ", ".join(f"{multiple:.3g}: {gain:.2f}" for multiple, gain in gains.items())
        table.add_row(family, f"{METHOD_SPECS[family].rate:g}", f"{best:.3g}", told)
    Console(width=120).print(table)
    rates = {task: trainings.lora(task)[0] for task in TASKS}
    record = {
        "command": f"python -m benchmarks.family_rates --families {' '.join(families)}",
        "machine": this_machine(),
        "learning_rates": rates,
        "families": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
