"""What forty families are to the sampler beside seven, and whether its models should know their principles.

    python -m benchmarks.families surrogate [--trainings 96]
    python -m benchmarks.families search [--seeds 2] [--trials 24]

Both train the top half of MiniLM on 256 questions in two epochs with one thread, and write to
`results/families.json`.

`surrogate` trains configurations of one to three families, drawn from all, once; the scores are kept in
`results/families_trainings.jsonl`. A model learns from some of them, drawn a hundred times, and foretells the
others. Figures are Spearman's rank correlation and the root mean square error, means with standard errors.
Rows differ in what the model is given of methods.

`search` gives the same number of trials to spaces with seven families and with all, and with all to a sampler
whose models know methods alone. Trials run to the end and are trained once. Fronts are valued on the test
split: from the trivial score to 1, and from LoRA of rank 32 on every linear layer down to the head alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from autopeft import Search, Training
from autopeft.core.configuration import Configuration
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.core.objectives import resolve_objectives
from autopeft.core.pareto import Axis, hypervolume
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import count_parameters
from autopeft.optimization.ehvi_sampler import EhviSampler
from autopeft.optimization.expected_improvement import Features
from autopeft.optimization.gaussian_process import GaussianProcess
from autopeft.search_spaces import LowMemory, PerLayer
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from benchmarks.rivals.setting import Setting
from benchmarks.uniform_lora import uniform
from benchmarks.untuned import valued

RESULTS = Path(__file__).parent / "results" / "families.json"
TRAININGS = RESULTS.with_name("families_trainings.jsonl")
TRAINING = Training(epochs=2, batch_size=16, validate_every=2, device="cpu", precision="32-true")
RATE = (5e-4, 1e-2)
SEVEN = ("lora", "ia3", "series", "parallel", "prefix", "layernorm", "bitfit")
FORTY = tuple(name for name, row in METHOD_SPECS.items() if row.kinds != {"state space"})
_KNOWN = (8, 16, 32, 64)
_REPEATS = 100


class MethodFeatures(Features):
    """Has a share of each method, as different from each other as any."""

    def shares(self, configuration: Configuration) -> list[float]:
        """Return the share of each method but the first."""
        methods = [adapter.method for _, adapter in configuration]
        return [methods.count(name) / max(1, len(methods)) for name in self.methods[1:]]


class PrincipleFeatures(Features):
    """Has the shares of principles alone."""

    def shares(self, configuration: Configuration) -> list[float]:
        """Return the share of each principle but the first."""
        principles = [adapter.specification.principle for _, adapter in configuration]
        known = list(dict.fromkeys(METHOD_SPECS[name].principle for name in self.methods))
        return [principles.count(name) / max(1, len(principles)) for name in known[1:]]


class HeavyFeatures(Features):
    """Has the shares of principles in full, and those of methods at three tenths."""

    def shares(self, configuration: Configuration) -> list[float]:
        """Return the shares without their weight."""
        return [share / 0.3 for share in super().shares(configuration)]


class NoFeatures(Features):
    """Does not tell methods apart."""

    def shares(self, configuration: Configuration) -> list[float]:
        """Return nothing."""
        return []


FEATURES: Mapping[str, type[Features]] = {
    "principles and methods": Features,
    "principles and methods, as heavy as other features": HeavyFeatures,
    "methods": MethodFeatures,
    "principles": PrincipleFeatures,
    "neither": NoFeatures,
}


class MethodSampler(EhviSampler):
    """Has models that know methods alone."""

    features = MethodFeatures


class BlindSampler(EhviSampler):
    """Has models that do not tell methods apart."""

    features = NoFeatures


def space_of(methods: Sequence[str]) -> PerLayer:
    """Return a space of some families in the top half, with few sizes: peft is asked about each."""
    sized = {name: METHOD_SPECS[name].sizes for name in methods if METHOD_SPECS[name].size_name}
    sizes = {name: (low, min(high, 8 * low)) for name, (low, high) in sized.items()}
    return LowMemory(methods=tuple(methods), sizes=sizes, learning_rate=RATE)


def measure_surrogate(setting: Setting, trainings: int, cache: Path) -> list[dict[str, Any]]:
    """Train what is not in the file yet, and return a row for each kind of features."""
    backbone = setting.load()
    objectives = resolve_objectives((setting.metric, "trainable_parameters"), setting.task.metrics)
    evaluator = Evaluator(backbone, setting.task, TRAINING, objectives, seed=0, cache=cache)
    evaluator.hidden_states.expect(trainings)
    forty = space_of(FORTY)
    possible, generator = forty.methods_on(backbone), random.Random(0)
    lines = TRAININGS.read_text().splitlines() if TRAININGS.exists() else []
    with TRAININGS.open("a") as file:
        for number in range(trainings):
            methods = generator.sample(possible, generator.randint(1, 3))
            drawn = space_of(methods).draw(generator, backbone)
            if number < len(lines):
                continue
            evaluation = evaluator.evaluate(drawn, seed=number)
            score = evaluation.values.get(setting.metric)
            lines.append(json.dumps({"configuration": drawn.to_dict(), "score": score}))
            file.write(lines[-1] + "\n")
            file.flush()
            print(f"{number}: {'+'.join(drawn.methods)} {score}", flush=True)
    found = [json.loads(line) for line in lines[:trainings]]
    known = {
        Configuration.from_dict(training["configuration"]): training["score"]
        for training in found
        if training["score"]
    }
    metric, configurations = objectives[0], list(known)
    scores = np.array([known[configuration] for configuration in configurations])
    rows = []
    for name, made in FEATURES.items():
        inputs = made.of(forty, backbone).inputs(configurations, metric)
        row: dict[str, Any] = {"features": name, "configurations": len(known)}
        for count in (count for count in _KNOWN if count < len(known) - 8):
            figures = []
            for repeat in range(_REPEATS):
                order = np.random.default_rng(repeat).permutation(len(known))
                first, rest = order[:count], order[count:]
                given, asked = (type(inputs)(*(part[places] for part in inputs)) for places in (first, rest))
                foretold, _ = GaussianProcess(given, scores[first]).predict(asked)
                rank = 0.0 if np.ptp(foretold) == 0 else float(spearmanr(foretold, scores[rest]).statistic)
                figures.append((rank, float(np.sqrt(np.mean((foretold - scores[rest]) ** 2)))))
            row[str(count)] = figures
        rows.append(row)
    return rows


ARMS: Mapping[str, tuple[Sequence[str], Callable[[int], EhviSampler]]] = {
    "seven": (SEVEN, lambda seed: EhviSampler(seed=seed)),
    "forty": (FORTY, lambda seed: EhviSampler(seed=seed)),
    "forty, models know methods alone": (FORTY, lambda seed: MethodSampler(seed=seed)),
    "forty, models know nothing of methods": (FORTY, lambda seed: BlindSampler(seed=seed)),
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
        scores = [record.evaluation.values.get(setting.metric, worst) for record in front.records]
        return {
            "arm": arm,
            "seed": setting.seed,
            "hypervolume": hypervolume(points, axes),
            "points": points,
            "methods_on_front": sorted({name for point in front for name in point.configuration.methods}),
            "methods_tried": len(
                {name for record in front.records for name in record.evaluation.configuration.methods}
            ),
            "trivial_trials": sum(score <= worst + 0.02 for score in scores),
            "trials": len(scores),
        }


def show_surrogate(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of models."""
    counts = [str(count) for count in _KNOWN if str(count) in rows[0]]
    table = Table(title=f"rank correlation, error; {rows[0]['configurations']} configurations")
    table.add_column("what the model is given of methods")
    for count in counts:
        table.add_column(f"{count} known", justify="right")
    for row in rows:
        cells = []
        for count in counts:
            ranks, errors = zip(*row[count], strict=True)
            spread = statistics.stdev(ranks) / math.sqrt(len(ranks))
            cells.append(f"{statistics.fmean(ranks):.3f} ± {spread:.3f}, {statistics.fmean(errors):.4f}")
        table.add_row(row["features"], *cells)
    Console(width=130).print(table)


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("surrogate", "search"), default="surrogate")
    parser.add_argument("--trainings", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.part == "surrogate":
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(dataset="questions", seed=0, trials=1)
            rows = measure_surrogate(setting, arguments.trainings, Path(folder))
        show_surrogate(rows)
        means = [
            {
                name: np.mean(value, axis=0).tolist() if isinstance(value, list) else value
                for name, value in row.items()
            }
            for row in rows
        ]
        record["surrogate"] = {
            "command": f"python -m benchmarks.families surrogate --trainings {arguments.trainings}",
            "rows": means,
        }
    else:
        command = (
            f"python -m benchmarks.families search --seeds {arguments.seeds} --trials {arguments.trials}"
        )
        runs: list[dict[str, Any]] = []
        for seed in range(arguments.seeds):
            for arm in ARMS:
                runs.append(searched(Setting(dataset="questions", seed=seed, trials=arguments.trials), arm))
                print(json.dumps(runs[-1]), flush=True)
                record["search"] = {"command": command, "runs": runs}
                RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
