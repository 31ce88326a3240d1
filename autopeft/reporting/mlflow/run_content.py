"""What the runs of a search hold in MLflow: metrics, parameters, tags and notes, as plain values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, Literal

from mlflow.entities import Dataset, Metric, RunStatus

from autopeft.core.adapter import Place, block_ranges, place_name
from autopeft.core.evaluation import Status, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.tables import markdown_block, markdown_text
from autopeft.reporting.formats import how_to_load, methods_label, outcome_line
from autopeft.reporting.front_plots import FRONT_COLOUR, KNEE_COLOUR, OTHER_COLOUR
from autopeft.reporting.mlflow.saved_view import COLOUR_TAG, log_scale_key, valid_key
from autopeft.reporting.tracker import SettingGroups

PARENT_TAG: Final = "mlflow.parentRunId"
SEARCH_TAG: Final = "autopeft.search"
TRIAL_TAG: Final = "autopeft.trial"
PARETO_TAG: Final = "autopeft.pareto"
KNEE_TAG: Final = "autopeft.knee"
STUDY_TAG: Final = "autopeft.study_id"
VIEW_TAG: Final = "autopeft.view"
VERDICT_TAG: Final = "autopeft.verdict"
CURVE_TAG: Final = "autopeft.curve_points"
NOTE_TAG: Final = "mlflow.note.content"
FRONT_PAGE: Final = "pareto/front.html"
PICTURE: Final = "configuration.svg"
KEY_PARAM: Final = "configuration_key"
LONGEST_TEXT: Final = 5000
_MOST_ROWS = 30
RUN_STATUS: Mapping[Status, str] = {
    "complete": RunStatus.to_string(RunStatus.FINISHED),
    "paused": RunStatus.to_string(RunStatus.SCHEDULED),
    "failed": RunStatus.to_string(RunStatus.FAILED),
    "infeasible": RunStatus.to_string(RunStatus.KILLED),
}
"""The status of a run, by its trial's."""
Standing = Literal["off", "front", "knee"]
"""Of a trial: off the front, on it, or its knee."""
_COLOURS: Mapping[Standing, str] = {"off": OTHER_COLOUR, "front": FRONT_COLOUR, "knee": KNEE_COLOUR}


def trial_metrics(
    record: TrialRecord, objectives: Sequence[Objective], known_points: int, ended: int
) -> list[Metric]:
    """Return a trial's curves beyond known points, its values, their logarithms for charts, and its cost.

    `ended` is the time in milliseconds.
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
    new = evaluation.curves[known_points:]
    points = [(f"curve/{point.metric}", point.value, point.step) for point in new]
    points += [(name, value, 0) for name, value in {**evaluation.values, **cost, **logarithms}.items()]
    return [
        Metric(valid_key(name), value, ended, step) for name, value, step in points if math.isfinite(value)
    ]


def trial_params(record: TrialRecord) -> dict[str, str]:
    """Return a trial's configuration: the adapters at each role that has some, as "lora(8) at 3, 6-11"."""
    configuration = record.evaluation.configuration
    lowest = configuration.lowest_block
    params = {
        "learning_rate": f"{configuration.learning_rate:g}",
        "weight_decay": f"{configuration.weight_decay:g}",
        "methods": methods_label(configuration, record.evaluation.values),
        "adapters": str(len(configuration)),
        "lowest_block": "none" if lowest is None else place_name(lowest),
        "seed": str(record.evaluation.seed),
        "warm_start": str(record.evaluation.warm_start).lower(),
        KEY_PARAM: configuration.key,
    }
    by_role: dict[str, dict[str, list[Place]]] = {}
    for site, adapter in configuration:
        by_role.setdefault(site.role, {}).setdefault(str(adapter).removesuffix("()"), []).append(site.place)
    for role, by_adapter in by_role.items():
        text = "; ".join(f"{adapter} at {block_ranges(places)}" for adapter, places in by_adapter.items())
        params[f"adapters/{role}"] = shortened(text)
    if configuration.allocation is not None:
        params["allocation"] = configuration.allocation
    if record.baseline is not None:
        params["baseline"] = shortened(record.baseline)
    return params


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
        tags["autopeft.reason"] = shortened(evaluation.reason)
    for seed, reason in evaluation.failures.items():
        tags[f"autopeft.reason.{seed}"] = shortened(reason)
    if record.duplicate_of is not None:
        tags["autopeft.duplicate_of"] = str(record.duplicate_of)
    if record.derived_from is not None:
        tags["autopeft.derived_from"] = str(record.derived_from)
    return tags


def front_tags(standing: Standing) -> dict[str, str]:
    """Return the tags that say where a trial stands, in words and as the colour of its run."""
    return {
        PARETO_TAG: str(standing != "off").lower(),
        KNEE_TAG: str(standing == "knee").lower(),
        COLOUR_TAG: _COLOURS[standing],
    }


def standing_of(tags: Mapping[str, str]) -> Standing | None:
    """Read what `front_tags` gave; None where some of it is missing."""
    return next((standing for standing in _COLOURS if front_tags(standing).items() <= tags.items()), None)


def trial_note(record: TrialRecord, objectives: Sequence[Objective], search_name: str, backbone: str) -> str:
    """Return the note on a trial's page: values, cost, how it is exported and loaded, where adapters sit.

    For the names see `how_to_load`.
    """
    evaluation, number = record.evaluation, record.number
    status = evaluation.status + (f": {evaluation.reason}" if evaluation.reason else "")
    outcome = markdown_text(outcome_line(record, objectives))
    parts = [f"**trial {number}** ({markdown_text(shortened(status))}): {outcome}"]
    if evaluation.status == "complete":
        shell, python = how_to_load(number, search_name, backbone)
        parts += ["Export it:", markdown_block(shell), "Load what was exported:", markdown_block(python)]
    parts += [f"Its adapters; as a picture below Artifacts, `{PICTURE}`:"]
    return "\n\n".join([*parts, markdown_block(shortened(evaluation.configuration.grid()))])


def search_params(identity: SettingGroups) -> dict[str, str]:
    """Return the settings of a search by "group.name"."""
    return {
        valid_key(f"{group}.{name}"): shortened(value) or "none"
        for group, fields in identity.items()
        for name, value in fields.items()
    }


def dataset(task: Mapping[str, str]) -> Dataset:
    """Return the name of the data and a digest of their content."""
    name = task.get("dataset", "data")
    content = task.get("content", json.dumps(dict(task), sort_keys=True))
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Dataset(name=Path(name).name, digest=digest, source_type="local", source=json.dumps({"uri": name}))


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
    rows = [["trial", *(objective.name for objective in objectives), "methods"]]
    rows.append(["---"] * len(rows[0]))
    for record in on_front[:_MOST_ROWS]:
        evaluation = record.evaluation
        methods = methods_label(evaluation.configuration, evaluation.values)
        rows.append([str(record.number), *map(evaluation.format, objectives), methods])
    rest = len(on_front) - _MOST_ROWS
    more = f"\n\n… and {rest} more in the artifact pareto/front.csv" if rest > 0 else ""
    title = f"**Pareto front: {len(on_front)} of {len(records)} trials**\n\n"
    table = "\n".join(f"| {' | '.join(map(markdown_text, row))} |" for row in rows)
    return title + table + more


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return the text, cut to a length with a mark that says so: MLflow cuts without one.

    Halves of characters, which file names and error messages may hold, are written out: a database takes
    none.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= longest else f"{text[: longest - 40]} … ({len(text)} characters)"
