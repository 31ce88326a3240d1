"""The whole way on real weights and data: search, front, baselines, export, and loading what was exported.

Run it with `make demo`; arguments are overrides of configs/demo.yaml, as in `run.trials=40`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from autopeft import ParetoFront, Search
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Evaluation
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import Attachment, FullFineTuning
from autopeft.optimization.trial_records import Spent
from autopeft.reporting.console import wide_console
from autopeft.yaml_config import load_config

CONFIG = Path("configs/demo.yaml")
EXPORT = Path("exports/demo")


@dataclass(frozen=True)
class Baseline:
    """A baseline's best evaluation over its learning rates.

    Attributes:
        name: "full fine-tuning", "head alone" or "uniform LoRA".
        evaluation: The evaluation with the best metric in validation.
        tried: Number of learning rates tried.
    """

    name: str
    evaluation: Evaluation
    tried: int


def full_fine_tuning(evaluator: Evaluator, learning_rates: Sequence[float]) -> Baseline:
    """Train every weight under the search's training settings, once a learning rate.

    Raises:
        RuntimeError: Not one of the trainings completed.
    """
    return _best("full fine-tuning", evaluator, learning_rates, FullFineTuning)


def head_alone(evaluator: Evaluator, learning_rates: Sequence[float]) -> Baseline:
    """Train the head on the frozen backbone under the search's settings, once a learning rate.

    Raises:
        RuntimeError: Not one of the trainings completed.
    """
    return _best("head alone", evaluator, learning_rates, Attachment)


def uniform_lora(evaluator: Evaluator, learning_rates: Sequence[float]) -> Baseline:
    """Train LoRA of rank 8 on every query and value, which people do today, once a learning rate.

    Raises:
        RuntimeError: Not one of the trainings completed.
    """
    sites = [site for site in evaluator.backbone.sites if site.role in ("query", "value")]
    return _best(
        "uniform LoRA", evaluator, learning_rates, Attachment, dict.fromkeys(sites, Adapter("lora", 8))
    )


def _best(
    name: str,
    evaluator: Evaluator,
    learning_rates: Sequence[float],
    attachment: type[Attachment],
    adapters: Mapping[Site, Adapter] | None = None,
) -> Baseline:
    evaluations = [
        evaluator.train(Configuration(adapters, learning_rate=rate), attachment=attachment).evaluation
        for rate in learning_rates
    ]
    complete = [evaluation for evaluation in evaluations if evaluation.status == "complete"]
    if not complete:
        raise RuntimeError(f"The baseline {name} failed: {evaluations[-1].reason}.")
    metric = evaluator.monitor
    best = max(complete, key=lambda evaluation: metric.sign * evaluation.values[metric.name])
    return Baseline(name, best, len(evaluations))


def compare(search: Search, front: ParetoFront, baselines: list[Baseline]) -> Table:
    """Return the front's best point beside the baselines, on the validation split that all chose by."""
    best = front.best()
    table = Table(
        title="The same epochs, batch size and data for all; each the best of what was tried",
        title_justify="left",
    )
    for heading in ("", "validation accuracy", "trainable parameters", "peak memory", "tried"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [("best of the search", best.values, len(front.records))]
    rows += [(baseline.name, baseline.evaluation.values, baseline.tried) for baseline in baselines]
    for name, values, tried in rows:
        cells = [objective.format(values[objective.name]) for objective in search.objectives]
        table.add_row(name, *cells, str(tried))
    return table


def conditions(front: ParetoFront, full: Baseline, head: Baseline, uniform: Baseline) -> list[str]:
    """Say what the front shows: its size, its span, and its best points beside the baselines."""
    parameters = [point.values["trainable_parameters"] for point in front]
    best = front.best().values["accuracy"]
    to_full = 100 * (full.evaluation.values["accuracy"] - best)
    to_head = 100 * (best - head.evaluation.values["accuracy"])
    accuracy, most = (uniform.evaluation.values[name] for name in ("accuracy", "trainable_parameters"))
    as_small = front.best(trainable_parameters=most)
    gain = 100 * (as_small.values["accuracy"] - accuracy)
    return [
        f"The front has {len(front)} points, the largest with {max(parameters) / min(parameters):.0f} times "
        "the parameters of the smallest.",
        f"Its best is {abs(to_full):.1f} points {'below' if to_full > 0 else 'above'} full fine-tuning and "
        f"{to_head:.1f} above the head alone.",
        f"With no more parameters than uniform LoRA, trial {as_small.number} is {abs(gain):.1f} points "
        f"{'above' if gain > 0 else 'below'} its best of {uniform.tried} learning rates, each one training.",
    ]


def main() -> None:
    """Run the demo."""
    started = time.monotonic()
    console = wide_console()
    loaded = load_config(CONFIG, sys.argv[1:])
    search = loaded.search
    front = search.run(**loaded.run)

    if Spent.of(front.records).trials < loaded.run["trials"]:
        console.print("Interrupted: `make demo` goes on from here.")
        return

    console.print("\nBaselines: every weight trained, the head alone, LoRA of rank 8 on query and value …")
    baselines = [
        full_fine_tuning(search.open().evaluator, learning_rates=(1e-4, 3e-4)),
        head_alone(search.open().evaluator, learning_rates=(5e-3, 2e-2)),
        uniform_lora(search.open().evaluator, learning_rates=(1e-3, 3e-3, 1e-2)),
    ]
    console.print(compare(search, front, baselines))

    for line in conditions(front, *baselines):
        console.print(line)

    chosen = front.best(trainable_parameters="400k")
    console.print(f"\nExporting the most accurate with at most 400 k parameters: {chosen}")
    console.print(chosen.configuration.grid(), markup=False, soft_wrap=True)
    report = chosen.export(EXPORT, overwrite=True)
    console.print(str(report), markup=False, soft_wrap=True)
    console.print(f"\nSee the front in the MLflow UI: make ui   (took {time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
