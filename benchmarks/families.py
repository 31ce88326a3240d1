"""What forty families are to the search beside seven, and whether models of the metric should know them.

    python -m benchmarks.families [--seeds 3] [--trials 24]

Searches train the top half of MiniLM on 256 questions in two epochs with one thread, and write to
`results/families.json`. Every space has the same number of trials, which run to the end and are trained once.
Fronts are valued on the test split: from the trivial score to 1, and from LoRA of rank 32 on every linear
layer down to the head alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from autopeft import Search, Training
from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.pareto import Axis, hypervolume
from autopeft.methods import count_parameters
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.expected_improvement import Features
from autopeft.search_spaces import LowMemory, PerLayer
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.family_fronts import trivial_trials
from benchmarks.rivals.setting import Setting
from benchmarks.uniform_lora import uniform
from benchmarks.untuned import valued

RESULTS = Path(__file__).parent / "results" / "families.json"
TRAINING = Training(epochs=2, batch_size=16, validate_every=2, device="cpu", precision="32-true")
RATE = (5e-4, 1e-2)
SEVEN = ("lora", "ia3", "series", "parallel", "prefix", "layernorm", "bitfit")
FORTY = tuple(name for name, row in METHOD_SPECS.items() if row.kinds != {"state space"})


class MethodFeatures(Features):
    """Tells models of the metric, too, which methods a configuration has."""

    def of_metric(self, configuration: Configuration) -> list[float]:
        """Return the shares of methods, beside the other features."""
        return [*super().of_metric(configuration), *self.method_shares(configuration)]


class MethodSampler(EhviSampler):
    """Has models of the metric that know the methods."""

    features = MethodFeatures


def space_of(methods: Sequence[str]) -> PerLayer:
    """Return a space of some families in the top half, with few sizes: peft is asked about each."""
    sized = {name: METHOD_SPECS[name].sizes for name in methods if METHOD_SPECS[name].size_name}
    sizes = {name: (low, min(high, 8 * low)) for name, (low, high) in sized.items()}
    return LowMemory(methods=tuple(methods), sizes=sizes, learning_rate=RATE)


ARMS: Mapping[str, tuple[Sequence[str], Callable[[int], EhviSampler]]] = {
    "seven": (SEVEN, lambda seed: EhviSampler(seed=seed)),
    "forty": (FORTY, lambda seed: EhviSampler(seed=seed)),
    "forty, models of the metric know the methods": (FORTY, lambda seed: MethodSampler(seed=seed)),
}


def searched(setting: Setting, arm: str) -> dict[str, Any]:
    """Search, and return what the front is worth."""
    methods, sampler = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            setting.model,
            setting.task,
            space_of(methods),
            objectives=(setting.metric, "trainable_parameters"),
            training=TRAINING,
            sampler=sampler(setting.seed),
            halving=None,
            seeds=1,
            seed=setting.seed,
            folder=folder,
            tracking=None,
        )
        front = search.run(trials=setting.trials, progress=False)
        opened = search.open()
        checkpoints = AdapterCheckpoints(search.folder / "adapters")
        members = [(point.configuration, point.values, checkpoints.load(point.record)) for point in front]
        points = valued(opened.evaluator, members, search.objectives)
        largest = count_parameters(opened.backbone, uniform(opened.backbone, 32, RATE[0]))
        worst = setting.task.trivial_score(setting.metric)
        metric, cost = search.objectives
        axes = (
            Axis(objective=metric, worst=worst, best=1.0),
            Axis(objective=cost, worst=float(largest), best=float(opened.backbone.head_parameters)),
        )
        return {
            "arm": arm,
            "seed": setting.seed,
            "hypervolume": hypervolume(points, axes),
            "points": points,
            "methods_on_front": sorted({name for point in front for name in point.configuration.methods}),
            "methods_tried": len(
                {name for record in front.records for name in record.evaluation.configuration.methods}
            ),
            "trivial_trials": trivial_trials(front.records, metric, worst),
            "trials": len(front.records),
        }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python -m benchmarks.families --seeds {arguments.seeds} --trials {arguments.trials}"
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for arm in ARMS:
            runs.append(searched(Setting(dataset="questions", seed=seed, trials=arguments.trials), arm))
            RESULTS.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    show(runs)


def show(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each space and what its models know."""
    table = Table("families", "hypervolume by seed", "methods on the first front", "at the trivial score")
    for arm in ARMS:
        found = [run for run in runs if run["arm"] == arm]
        table.add_row(
            arm,
            ", ".join(f"{run['hypervolume']:.3f}" for run in found),
            ", ".join(found[0]["methods_on_front"]),
            f"{sum(run['trivial_trials'] for run in found)} of {sum(run['trials'] for run in found)}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
