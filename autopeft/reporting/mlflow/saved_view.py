"""A saved view of MLflow's UI: one link that opens it on the scatter charts of a search.

The UI keeps what its "Share" button makes in an experiment tag, and draws a run in the colour of a tag.
Neither is documented: what depends on them is here, a failure costs the link alone, and
`tests/reporting/test_browser.py` opens it in a browser. Scatter charts have no logarithmic axes, so they show
logarithms, logged as metrics of their own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import uuid
import zlib
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from autopeft.core.evaluation import deviation_of
from autopeft.core.objectives import Objective
from autopeft.reporting.front_plots import projections
from autopeft.reporting.mlflow.tracking_uri import redact_in

_logger = logging.getLogger(__name__)
COLOUR_TAG = "mlflow.runColor"
HYPERVOLUME_KEY, TIME_KEY = "search/hypervolume", "search/wall_seconds"
"""Metrics of a trial's run: what the search had reached, and in how many seconds of training."""
_TAG = "mlflow.sharedViewState."
_MOST_RUNS = 1000
_REFUSED_IN_NAMES = re.compile(r"[^\w.\- :/]")


def valid_key(name: str) -> str:
    """Return a metric's or parameter's name as MLflow takes it, as in "F1_5" for "F1@5"."""
    return _REFUSED_IN_NAMES.sub("_", name)


def log_scale_key(objective: Objective) -> str:
    """Return the name of the metric with an objective's decimal logarithm."""
    return valid_key(f"log10_{objective.name}")


def view_state(parent_run_id: str, objectives: Sequence[Objective]) -> str:
    """Return the view as JSON: of the trials of a search, the first metric against every cost.

    A last chart has the hypervolume that the search had reached by each trial's latest training, against the
    seconds that all trainings had taken.
    """
    first = next(objective.name for objective in objectives if objective.is_metric)
    metric, deviation = valid_key(first), valid_key(deviation_of(first))
    costs = [cost for cost, _ in projections(objectives)]
    keys = [log_scale_key(cost) if cost.log_scale else valid_key(cost.name) for cost in costs]
    shared = {"deleted": False, "isGenerated": False}
    section = str(uuid.uuid5(uuid.NAMESPACE_OID, parent_run_id))
    shown = [
        (key, metric, valid_key(cost.name), f"{metric} against {valid_key(cost.name)}")
        for cost, key in zip(costs, keys, strict=True)
    ]
    shown.append((TIME_KEY, HYPERVOLUME_KEY, TIME_KEY, "hypervolume against seconds of training"))
    charts = [
        {
            "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{parent_run_id}/{name}")),
            "type": "SCATTER",
            "metricSectionId": section,
            "runsCountToCompare": _MOST_RUNS,
            "xaxis": {"key": key, "type": "METRIC"},
            "yaxis": {"key": value, "type": "METRIC"},
            "displayName": title,
            **shared,
        }
        for key, value, name, title in shown
    ]
    layout = {"display": True, "isReordered": True, "columns": min(len(charts), 3), "cardHeight": 480}
    columns = [f"metrics.`{name}`" for name in (metric, deviation, *(valid_key(cost.name) for cost in costs))]
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_run_id}'",
        # Any order but start time, which nests children under the collapsed parent and draws that alone.
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "selectedColumns": [*columns, "tags.`autopeft.pareto`", "tags.`autopeft.knee`"],
        **{key: [] for key in ("datasetsFilter", "runsPinned", "runsHidden")},
        **{key: {} for key in ("runsExpanded", "runsVisibilityMap", "groupsExpanded")},
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": False,
        "viewMaximized": False,
        "isAccordionReordered": True,
        "autoRefreshEnabled": True,
        "groupBy": None,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": section, "name": "Pareto front", **layout, **shared}],
    }
    return json.dumps(state, separators=(",", ":"))


def save_view(client: MlflowClient, experiment_id: str, state: str) -> str | None:
    """Write a view to its experiment and return its key, or None where MLflow refuses it."""
    key = hashlib.sha256(state.encode()).hexdigest()
    packed = "deflate;" + base64.b64encode(zlib.compress(state.encode())).decode()
    try:
        client.set_experiment_tag(experiment_id, f"{_TAG}{key}", packed)
    except MlflowException as error:
        said = redact_in(error, client.tracking_uri)
        _logger.warning("The view of the front could not be saved in MLflow: %s", said)
        return None
    return key


def view_link(ui_url: str, experiment_id: str, key: str | None) -> str:
    """Return the link that opens the UI on a saved view; without a key, on the experiment's charts."""
    shared = "" if key is None else f"viewStateShareKey={key}&"
    return f"{ui_url.rstrip('/')}/#/experiments/{experiment_id}/runs?{shared}compareRunsMode=CHART"
