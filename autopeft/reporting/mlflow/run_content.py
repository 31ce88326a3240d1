"""What the run of a trial holds (values, curves, cost, configuration), and the front in the search's run."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Final

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, RunStatus

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Status, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.reporting.configuration_image import configuration_image
from autopeft.reporting.frame import front_frame
from autopeft.reporting.front_plots import front_figure, front_image
from autopeft.reporting.html_page import save_html_page
from autopeft.reporting.mlflow.saved_view import colour_tag, log_scale_key, valid_key

PARENT_TAG: Final = "mlflow.parentRunId"
TRIAL_TAG: Final = "autopeft.trial"
PARETO_TAG: Final = "autopeft.pareto"
STUDY_TAG: Final = "autopeft.study_id"
CURVE_TAG: Final = "autopeft.curve_points"
KEY_PARAM: Final = "configuration_key"
_LONGEST_TAG = 5000
_MOST_ROWS = 30
RUN_STATUS: Mapping[Status, str] = {
    "complete": RunStatus.to_string(RunStatus.FINISHED),
    "paused": RunStatus.to_string(RunStatus.SCHEDULED),
    "failed": RunStatus.to_string(RunStatus.FAILED),
    "infeasible": RunStatus.to_string(RunStatus.KILLED),
}
"""The status of a run, by its trial's."""


def run_name(number: int, configuration: Configuration) -> str:
    """Return the name of a trial's run."""
    return f"trial {number} · {_methods(configuration)}"


def _methods(configuration: Configuration) -> str:
    return "+".join(configuration.methods) or "head alone"


def save_configuration(configuration: Configuration, folder: Path) -> None:
    """Write a configuration and its picture into a folder."""
    configuration.save(folder / "configuration.yaml")
    (folder / "configuration.png").write_bytes(configuration_image(configuration))


def trial_metrics(
    record: TrialRecord, objectives: Sequence[Objective], known_points: int, ended: int
) -> list[Metric]:
    """Return a trial's curves, values and cost.

    Args:
        record: The trial.
        objectives: Those with a logarithmic scale are also logged as logarithms, for MLflow's charts.
        known_points: Points of its curves that the run already has.
        ended: When it was over, in milliseconds of the clock.
    """
    evaluation = record.evaluation
    cost = {f"cost/{name}": float(value) for name, value in asdict(evaluation.cost).items()}
    logarithms = {
        log_scale_key(objective): math.log10(value)
        for objective in objectives
        if objective.log_scale and (value := evaluation.values.get(objective.name, 0.0)) > 0
    }
    # Curves have names of their own: MLflow shows a name's value at the highest step, which is the last
    # validation's and not the kept one's.
    curves = [
        Metric(valid_key(f"curve/{point.metric}"), point.value, ended, point.step)
        for point in evaluation.curves[known_points:]
    ]
    values = {valid_key(name): value for name, value in {**evaluation.values, **cost}.items()} | logarithms
    metrics = [*curves, *(Metric(name, value, ended, 0) for name, value in values.items())]
    return [metric for metric in metrics if math.isfinite(metric.value)]


def trial_params(record: TrialRecord) -> dict[str, str]:
    """Return a trial's configuration: the adapters at each role that has some, as "lora(8) at 3, 6-11"."""
    configuration = record.evaluation.configuration
    lowest = configuration.lowest_block
    params = {
        "learning_rate": f"{configuration.learning_rate:g}",
        "weight_decay": f"{configuration.weight_decay:g}",
        "methods": _methods(configuration),
        "adapters": str(len(configuration)),
        "lowest_block": "none" if lowest is None else str(lowest),
        "seed": str(record.evaluation.seed),
        "warm_start": str(record.evaluation.warm_start).lower(),
        KEY_PARAM: configuration.key,
    }
    blocks: dict[str, dict[str, list[int]]] = {}
    for site, adapter in configuration:
        blocks.setdefault(site.role, {}).setdefault(str(adapter).removesuffix("()"), []).append(site.block)
    for role, by_adapter in blocks.items():
        text = "; ".join(f"{adapter} at {_ranges(numbers)}" for adapter, numbers in by_adapter.items())
        params[f"adapters/{role}"] = shortened(text, _LONGEST_TAG)
    if record.baseline is not None:
        params["baseline"] = shortened(record.baseline, _LONGEST_TAG)
    return params


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as in "0, 3-5"."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda entry: entry[1] - entry[0])
    spans = [[number for _, number in span] for _, span in runs]
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)


def outcome_tags(record: TrialRecord) -> dict[str, str]:
    """Return the tags that say what became of a trial; a run that lacks one of them is out of date."""
    evaluation = record.evaluation
    tags = {
        "autopeft.status": evaluation.status,
        "autopeft.fidelity": f"{evaluation.fidelity:.4f}",
        "autopeft.trainings": str(evaluation.trainings),
        CURVE_TAG: str(len(evaluation.curves)),
    }
    if evaluation.reason is not None:
        tags["autopeft.reason"] = shortened(evaluation.reason, _LONGEST_TAG)
    for seed, reason in evaluation.failures.items():
        tags[f"autopeft.reason.{seed}"] = shortened(reason, _LONGEST_TAG)
    if record.duplicate_of is not None:
        tags["autopeft.duplicate_of"] = str(record.duplicate_of)
    return tags


def front_tags(*, on_front: bool) -> dict[str, str]:
    """Return the tags that say whether a trial is on the front, in words and as the colour of its run."""
    return {PARETO_TAG: str(on_front).lower(), **colour_tag(on_front=on_front)}


def write_front(
    client: MlflowClient,
    run_id: str,
    records: Sequence[TrialRecord],
    members: Collection[int],
    objectives: Sequence[Objective],
) -> None:
    """Write the front's page, picture and tables to the search's run, in place of the last ones."""
    frame = front_frame(records, members, objectives)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        figure = front_figure(records, members, objectives)
        save_html_page(figure, place / "front.html", title="Pareto front")
        (place / "front.png").write_bytes(front_image(records, members, objectives))
        frame[frame["front"]].drop(columns="front").to_csv(place / "front.csv", index=False)
        frame.to_csv(place / "trials.csv", index=False)
        client.log_artifacts(run_id, folder, "pareto")


def write_table(
    client: MlflowClient,
    run_id: str,
    records: Sequence[TrialRecord],
    members: Collection[int],
    objectives: Sequence[Objective],
) -> None:
    """Write the table of all trials, which MLflow's UI can compare between searches."""
    # log_table appends to a file that is there: a file a number of trials, written once.
    again = sum(record.evaluation.trainings - 1 for record in records)
    path = f"pareto/trials_{len(records):05d}{f'_and_{again}_again' if again else ''}.json"
    if path not in {file.path for file in client.list_artifacts(run_id, "pareto")}:
        client.log_table(run_id, front_frame(records, members, objectives), path)


def write_dataset(client: MlflowClient, run_id: str, task: Mapping[str, str]) -> None:
    """Name the data as an input of the search's run, with a digest of their content."""
    name = task.get("dataset", "data")
    content = task.get("content", json.dumps(dict(task), sort_keys=True))
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    source = json.dumps({"uri": name})
    dataset = Dataset(name=Path(name).name, digest=digest, source_type="local", source=source)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=[])])


def front_markdown(
    records: Sequence[TrialRecord], members: Collection[int], objectives: Sequence[Objective]
) -> str:
    """Return the front as a Markdown table, from the best value of the first objective down."""
    first = objectives[0]
    on_front = sorted(
        (record for record in records if record.number in members),
        key=lambda record: record.evaluation.values[first.name],
        reverse=first.direction == "maximize",
    )
    heading = ["trial", *(objective.name for objective in objectives), "methods"]
    lines = [" | ".join(heading), " | ".join("---" for _ in heading)]
    for record in on_front[:_MOST_ROWS]:
        values = [record.evaluation.format(objective) for objective in objectives]
        methods = _methods(record.evaluation.configuration)
        lines.append(" | ".join([str(record.number), *values, methods]))
    rest = len(on_front) - _MOST_ROWS
    more = f"\n\n… and {rest} more in the artifact pareto/front.csv" if rest > 0 else ""
    title = f"**Pareto front: {len(on_front)} of {len(records)} trials**\n\n"
    return title + "\n".join(f"| {line} |" for line in lines) + more


def shortened(text: str, longest: int) -> str:
    """Return the text, cut to a length with a mark that says so: MLflow cuts without one.

    Halves of characters, which file names and error messages may hold, are written out: a database takes
    none.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= longest else f"{text[: longest - 40]} … ({len(text)} characters)"
