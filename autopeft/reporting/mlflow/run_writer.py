"""Writes the runs of a search's trials through MLflow's client, and finds those written before."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.reporting.configuration_image import configuration_svg
from autopeft.reporting.formats import methods_label
from autopeft.reporting.mlflow import run_content as content

_METRICS_A_BATCH, _TEXTS_A_BATCH = 800, 100  # MLflow takes 1,000, of them 100 parameters and 100 tags


class RunWriter:
    """Keeps one run, with some tags, for each trial of a search, and deletes none.

    The names of search and backbone are for what a trial's page says on exporting and loading it.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        tags: dict[str, str],
        objectives: Sequence[Objective],
        *,
        search_name: str = "",
        backbone: str = "",
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._tags = tags
        self._objectives = objectives
        self._names = search_name, backbone
        self._runs: dict[int, str] = {}
        self._written: dict[int, TrialRecord] = {}  # what whole runs hold
        self._points: dict[int, int] = {}  # of the learning curve, in runs that hold a result
        self._interrupted: dict[int, str] = {}  # runs without a result, left by an earlier call
        self._standings: dict[int, content.Standing | None] = {}  # as the tags say; a new run's say "off"

    def adopt(self, runs: Sequence[Run], records: Sequence[TrialRecord]) -> int:
        """Take over an earlier call's runs; return how many finished ones are not the study's, and stay."""
        known, foreign = {record.number: record for record in records}, 0
        for run in runs:
            number, run_id = int(run.data.tags[content.TRIAL_TAG]), str(run.info.run_id)
            record, key = known.get(number), run.data.params.get(content.KEY_PARAM)
            if key is None:
                self._interrupted[number] = run_id
            elif record is None or key != record.evaluation.configuration.key or number in self._runs:
                foreign += 1
            else:
                self._runs[number] = run_id
                self._points[number] = int(run.data.tags.get(content.CURVE_TAG, 0))
                self._standings[number] = content.standing_of(run.data.tags)
                is_ended = run.info.status == content.RUN_STATUS[record.evaluation.status]
                if is_ended and content.outcome_tags(record).items() <= run.data.tags.items():
                    self._written[number] = record
        return foreign

    def behind(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Return the records whose runs are missing or out of date."""
        return [record for record in records if self._written.get(record.number) != record]

    def start(self, number: int, configuration: Configuration, started: int) -> None:
        """Show a trial as running since a time in milliseconds, unless it has a run."""
        if number in self._runs:
            return
        name = f"trial {number} · {methods_label(configuration)}"
        run_id = self._interrupted.pop(number, None)
        if run_id is None:
            tags = {**self._tags, content.TRIAL_TAG: str(number), **content.front_tags("off")}
            run_id = str(self._client.create_run(self._experiment_id, started, tags, name).info.run_id)
        else:
            self._client.update_run(run_id, status="RUNNING", name=name)
        self._runs[number] = run_id

    def finish(
        self,
        record: TrialRecord,
        members: Collection[int],
        ended: int,
        figures: Mapping[str, float],
        knee: int | None = None,
    ) -> None:
        """Write a trial's result and end its run at a time in milliseconds; doing so again adds nothing.

        `members` are the trials on the front, and `figures` of the search at that time.
        """
        evaluation, number = record.evaluation, record.number
        configuration = evaluation.configuration
        standing = _standing(number, members, knee)
        moved = standing != self._standings.get(number, "off")
        self.start(number, configuration, ended - int(1000 * evaluation.cost.wall_seconds))
        run_id, points = self._runs[number], self._points.get(number)
        if points is None:
            self._client.log_text(run_id, configuration.to_yaml(), "configuration.yaml")
            self._client.log_text(run_id, configuration_svg(configuration), content.PICTURE)
        note = content.trial_note(record, self._objectives, *self._names)
        tags = {content.NOTE_TAG: note} | (content.front_tags(standing) if moved else {})
        log_in_batches(
            self._client,
            run_id,
            metrics=[
                *content.trial_metrics(record, self._objectives, points or 0, ended),
                *(Metric(name, value, ended, 0) for name, value in figures.items()),
            ],
            params=content.trial_params(record) if points is None else {},
            tags=tags | content.outcome_tags(record),
        )
        self._client.set_terminated(run_id, status=content.RUN_STATUS[evaluation.status], end_time=ended)
        self._points[number], self._written[number] = len(evaluation.curves), record
        self._standings[number] = standing

    def mark(self, members: Collection[int], knee: int | None = None) -> None:
        """Bring the tags that say which trials are on the front, and which is its knee, up to date."""
        for number in sorted(self._points.keys() & {*self._standings, *members}):
            standing = _standing(number, members, knee)
            if standing != self._standings.get(number, "off"):
                log_in_batches(self._client, self._runs[number], tags=content.front_tags(standing))
                self._standings[number] = standing

    def end_unfinished(self) -> None:
        """End the runs of interrupted trials; the search's next call goes on with them."""
        running = [run_id for number, run_id in self._runs.items() if number not in self._points]
        for run_id in (*running, *self._interrupted.values()):
            self._client.set_terminated(run_id, status="KILLED")


def _standing(number: int, members: Collection[int], knee: int | None) -> content.Standing:
    if number not in members:
        return "off"
    return "knee" if number == knee else "front"


def log_in_batches(
    client: MlflowClient,
    run_id: str,
    *,
    metrics: Sequence[Metric] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log any number of metrics, parameters and tags."""
    all_params = [Param(*entry) for entry in (params or {}).items()]
    all_tags = [RunTag(*entry) for entry in (tags or {}).items()]
    texts = max(len(all_params), len(all_tags))
    batches = max(math.ceil(len(metrics) / _METRICS_A_BATCH), math.ceil(texts / _TEXTS_A_BATCH))
    for batch in reversed(range(batches)):  # the texts last: a run that has them has all its metrics
        some = slice(batch * _TEXTS_A_BATCH, (batch + 1) * _TEXTS_A_BATCH)
        client.log_batch(
            run_id,
            metrics=metrics[batch * _METRICS_A_BATCH : (batch + 1) * _METRICS_A_BATCH],
            params=all_params[some],
            tags=all_tags[some],
        )
