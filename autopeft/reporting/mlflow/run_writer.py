"""Writes the runs of a search's trials through MLflow's client, and finds those written before."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.reporting.mlflow import run_content as content

_METRICS_A_BATCH = 1000


class RunWriter:
    """Keeps one run for each trial of a search, and deletes none.

    Args:
        client: MLflow's client.
        experiment_id: The experiment.
        parent: The search's run.
        study_id: The study's id, which all runs of the search carry.
        objectives: The search's objectives.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        parent: str,
        study_id: str,
        objectives: Sequence[Objective],
    ) -> None:
        self._client = client
        self._experiment_id = experiment_id
        self._parent = parent
        self._study_id = study_id
        self._objectives = objectives
        self._runs: dict[int, str] = {}
        self._written: dict[int, TrialRecord] = {}  # what whole runs hold
        self._points: dict[int, int] = {}  # of the learning curve, in runs that hold a result
        self._interrupted: dict[int, str] = {}  # runs without a result, left by an earlier call
        self._tagged: set[int] = set()  # trials whose runs say that they are on the front

    def adopt(self, runs: Sequence[Run], records: Sequence[TrialRecord]) -> int:
        """Take over the runs of an earlier call.

        Args:
            runs: The search's runs of trials.
            records: The study's trials.

        Returns:
            How many finished runs are not those of the study; they are left as they are.
        """
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
                if run.data.tags.get(content.PARETO_TAG) == "true":
                    self._tagged.add(number)
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
        name = content.run_name(number, configuration)
        run_id = self._interrupted.pop(number, None)
        if run_id is None:
            tags = {
                content.PARENT_TAG: self._parent,
                content.STUDY_TAG: self._study_id,
                content.TRIAL_TAG: str(number),
            }
            tags |= content.front_tags(on_front=False)
            run = self._client.create_run(self._experiment_id, started, tags, name)
            run_id = str(run.info.run_id)
        else:
            self._client.update_run(run_id, status="RUNNING", name=name)
        self._runs[number] = run_id

    def finish(self, record: TrialRecord, members: Collection[int], ended: int) -> None:
        """Write a trial's result and end its run at a time in milliseconds; doing so again adds nothing."""
        evaluation, number = record.evaluation, record.number
        self.start(number, evaluation.configuration, ended - int(1000 * evaluation.cost.wall_seconds))
        run_id, points = self._runs[number], self._points.get(number)
        if points is None:
            with tempfile.TemporaryDirectory() as folder:
                content.save_configuration(evaluation.configuration, Path(folder))
                self._client.log_artifacts(run_id, folder)
        metrics = content.trial_metrics(record, self._objectives, points or 0, ended)
        rest = len(metrics) % _METRICS_A_BATCH
        log_metrics(self._client, run_id, metrics[: len(metrics) - rest])
        on_front = number in members
        params = content.trial_params(record) if points is None else {}
        tags = content.outcome_tags(record) | content.front_tags(on_front=on_front)
        self._client.log_batch(
            run_id,
            metrics=metrics[len(metrics) - rest :],
            params=[Param(*entry) for entry in params.items()],
            tags=[RunTag(*entry) for entry in tags.items()],
        )
        self._client.set_terminated(run_id, status=content.RUN_STATUS[evaluation.status], end_time=ended)
        self._points[number], self._written[number] = len(evaluation.curves), record
        (self._tagged.add if on_front else self._tagged.discard)(number)

    def mark(self, members: Collection[int]) -> None:
        """Bring the tags that say which trials are on the front up to date."""
        for number in sorted(self._tagged ^ (set(members) & self._points.keys())):
            tags = content.front_tags(on_front=number in members)
            self._client.log_batch(self._runs[number], tags=[RunTag(*entry) for entry in tags.items()])
            self._tagged ^= {number}

    def end_unfinished(self) -> None:
        """End the runs of interrupted trials; the search's next call goes on with them."""
        for number, run_id in self._runs.items():
            if number not in self._points:
                self._client.set_terminated(run_id, status="KILLED")
        for run_id in self._interrupted.values():
            self._client.set_terminated(run_id, status="KILLED")


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    """Log any number of metrics."""
    for start in range(0, len(metrics), _METRICS_A_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_BATCH])
