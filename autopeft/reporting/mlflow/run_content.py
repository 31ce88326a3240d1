"""What a trial's MLflow run holds (values, curves, cost, configuration), and the front in the search's."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
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
from autopeft.reporting.mlflow.run_backends import FinishedRun
from autopeft.reporting.mlflow.saved_view import valid_key

PARENT_TAG: Final = "mlflow.parentRunId"
TRIAL_TAG: Final = "autopeft.trial"
PARETO_TAG: Final = "autopeft.pareto"
FIDELITY_TAG: Final = "autopeft.optimization.successive_halving"
TRAININGS_TAG: Final = "autopeft.trainings"
KEY_PARAM: Final = "configuration_key"
_LONGEST_TAG = 5000
_MOST_ROWS = 30
_RUN_STATUS: Mapping[Status, str] = {
    "complete": RunStatus.to_string(RunStatus.FINISHED),
    "paused": RunStatus.to_string(RunStatus.SCHEDULED),
    "failed": RunStatus.to_string(RunStatus.FAILED),
    "infeasible": RunStatus.to_string(RunStatus.KILLED),
}


def started_run(parent: str, number: int, configuration: Configuration) -> tuple[str, dict[str, str]]:
    """Return the name and the tags of a trial's run below the search's."""
    methods = "+".join(configuration.methods) or "head alone"
    return (
        f"trial {number} · {methods}",
        {PARENT_TAG: parent, TRIAL_TAG: str(number), PARETO_TAG: "false"},
    )


def finished_run(
    parent: str, record: TrialRecord, *, on_front: bool, known_points: int = 0, ended: int
) -> FinishedRun:
    """Return a trial's run: FINISHED, FAILED, KILLED where infeasible, SCHEDULED where paused.

    Args:
        parent: The search's run.
        record: The trial.
        on_front: Whether it is on the front.
        known_points: Points of its curves that the run already has.
        ended: When it was over, in milliseconds of the clock.
    """
    evaluation = record.evaluation
    name, tags = started_run(parent, record.number, evaluation.configuration)
    return FinishedRun(
        name=name,
        tags={**tags, **_tags(record, on_front=on_front)},
        params=_params(record),
        metrics=_metrics(record, known_points),
        status=_RUN_STATUS[evaluation.status],
        seconds=evaluation.cost.wall_seconds,
        ended=ended,
        save=partial(_save_configuration, evaluation.configuration),
    )


def _save_configuration(configuration: Configuration, folder: Path) -> None:
    configuration.save(folder / "configuration.yaml")
    (folder / "configuration.png").write_bytes(configuration_image(configuration))


def _metrics(record: TrialRecord, known_points: int) -> list[Metric]:
    evaluation = record.evaluation
    now = int(time.time() * 1000)
    cost = {
        "cost/wall_seconds": evaluation.cost.wall_seconds,
        "cost/cpu_seconds": evaluation.cost.cpu_seconds,
        "cost/gpu_seconds": evaluation.cost.gpu_seconds,
        "cost/steps": float(evaluation.cost.steps),
    }
    # Curves have names of their own: MLflow shows a name's value at the highest step, which is the last
    # validation's and not the kept one's.
    curves = [
        Metric(valid_key(f"curve/{point.metric}"), point.value, now, point.step)
        for point in evaluation.curves[known_points:]
    ]
    values = [Metric(valid_key(name), value, now, 0) for name, value in {**evaluation.values, **cost}.items()]
    return [one for one in (*curves, *values) if math.isfinite(one.value)]


def _params(record: TrialRecord) -> dict[str, str]:
    configuration = record.evaluation.configuration
    lowest = configuration.lowest_block
    params = {
        "learning_rate": f"{configuration.learning_rate:g}",
        "methods": "+".join(configuration.methods) or "head alone",
        "adapters": str(len(configuration)),
        "lowest_block": "none" if lowest is None else str(lowest),
        "seed": str(record.evaluation.seed),
        "warm_start": str(record.evaluation.warm_start).lower(),
        KEY_PARAM: configuration.key,
    }
    if record.baseline is not None:
        params["baseline"] = shortened(record.baseline, _LONGEST_TAG)
    return params


def training_tags(record: TrialRecord) -> dict[str, str]:
    """Return the tags that say how much training is behind a run's values."""
    evaluation = record.evaluation
    return {FIDELITY_TAG: f"{evaluation.fidelity:.4f}", TRAININGS_TAG: str(evaluation.trainings)}


def _tags(record: TrialRecord, *, on_front: bool) -> dict[str, str]:
    tags = {
        "autopeft.status": record.evaluation.status,
        **training_tags(record),
        PARETO_TAG: str(on_front).lower(),
    }
    if record.evaluation.reason is not None:
        tags["autopeft.reason"] = shortened(record.evaluation.reason, _LONGEST_TAG)
    for seed, reason in record.evaluation.failures.items():
        tags[f"autopeft.reason.{seed}"] = shortened(reason, _LONGEST_TAG)
    if record.duplicate_of is not None:
        tags["autopeft.duplicate_of"] = str(record.duplicate_of)
    return tags


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
    again = sum(one.evaluation.trainings - 1 for one in records)
    path = f"pareto/trials_{len(records):05d}{f'_and_{again}_again' if again else ''}.json"
    if path not in {one.path for one in client.list_artifacts(run_id, "pareto")}:
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
        key=lambda one: one.evaluation.values[first.name],
        reverse=first.direction == "maximize",
    )
    heading = ["trial", *(one.name for one in objectives), "methods"]
    lines = [" | ".join(heading), " | ".join("---" for _ in heading)]
    for record in on_front[:_MOST_ROWS]:
        values = [record.evaluation.format(one) for one in objectives]
        methods = "+".join(record.evaluation.configuration.methods) or "head alone"
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
