"""How a trial becomes an MLflow run: through MLflow's client, or in one transaction where the store is local.

The client takes a trial in seven transactions and some fifty statements, as it cannot know that the run is
new. Where MLflow itself writes to a database, `DatabaseRuns` writes the same rows to the same tables in one
transaction, which is also safer: a run is either there with everything or not. Tables are no documented
interface: what depends on them is here, `DatabaseRuns.of` looks whether they are those it knows, and
`tests/test_trial_runs.py` compares its runs with the client's.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_METRICS_A_BATCH = 1000
_NAME_TAG = "mlflow.runName"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a finished trial's run holds.

    Attributes:
        name: The run's name.
        tags: By name; also those it was started with.
        params: By name.
        metrics: Finite ones, each with its time and step.
        status: How it ended, in MLflow's words.
        seconds: How long the trial took.
        save: Writes the run's artifacts into a folder.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Sequence[Metric]
    status: str
    seconds: float
    save: Callable[[Path], None]


class TrialRuns(ABC):
    """Writes the runs of trials to one experiment."""

    @abstractmethod
    def start(self, name: str, tags: Mapping[str, str], *, started: int) -> str:
        """Make a run that is shown as running since a time in milliseconds, and return its id."""

    @abstractmethod
    def finish(self, run_id: str | None, run: FinishedRun) -> str:
        """Write what a run holds and end it; make it where it was not started. Return its id."""

    @abstractmethod
    def mark(self, tag: str, values: Mapping[str, str]) -> None:
        """Give runs, by their ids, a new value of a tag that they have."""


class ClientRuns(TrialRuns):
    """Writes runs to any store that MLflow's client can reach.

    Args:
        client: The client.
        experiment_id: The experiment.
    """

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self._client = client
        self._experiment_id = experiment_id

    def start(self, name: str, tags: Mapping[str, str], *, started: int) -> str:
        """Make a run; see `TrialRuns.start`."""
        run = self._client.create_run(self._experiment_id, started, dict(tags), name)
        return str(run.info.run_id)

    def finish(self, run_id: str | None, run: FinishedRun) -> str:
        """Write a run; see `TrialRuns.finish`."""
        if run_id is None:
            started = int(1000 * (time.time() - run.seconds))
            new = self._client.create_run(self._experiment_id, started, dict(run.tags), run.name)
            run_id = str(new.info.run_id)
        with tempfile.TemporaryDirectory() as folder:
            run.save(Path(folder))
            self._client.log_artifacts(run_id, folder)
        for start in range(0, max(1, len(run.metrics)), _METRICS_A_BATCH):
            last = start + _METRICS_A_BATCH >= len(run.metrics)
            self._client.log_batch(
                run_id,
                metrics=run.metrics[start : start + _METRICS_A_BATCH],
                params=[Param(*one) for one in run.params.items()] if last else (),
                tags=[RunTag(*one) for one in run.tags.items()] if last else (),
            )
        self._client.set_terminated(run_id, status=run.status)
        return run_id

    def mark(self, tag: str, values: Mapping[str, str]) -> None:
        """Change a tag; see `TrialRuns.mark`."""
        for run_id, value in values.items():
            self._client.set_tag(run_id, tag, value)


class DatabaseRuns(TrialRuns):
    """Writes runs to the database of a store in this process, a transaction each.

    Args:
        store: MLflow's store.
        experiment_id: The experiment.
    """

    def __init__(self, store: SqlAlchemyStore, experiment_id: str) -> None:
        self._store = store
        self._experiment_id = int(experiment_id)
        self._artifacts = str(store.get_experiment(experiment_id).artifact_location).rstrip("/")

    @classmethod
    def of(cls, client: MlflowClient, experiment_id: str) -> Self | None:
        """Return a writer for a client's store; None where it has no database, or an unknown one."""
        store = client._tracking_client.store
        metric = _metric_row("", Metric("", 0.0, 0, 0))
        known: Sequence[tuple[Any, Mapping[str, Any]]] = (
            (SqlRun, _run_row("", 0, "", "", 0)),
            (SqlTag, _text_row("", "", "")),
            (SqlParam, _text_row("", "", "")),
            (SqlMetric, metric),
            (SqlLatestMetric, metric),
        )
        for table, row in known:
            columns = {one.name for one in table.__table__.columns}
            needed = {one.name for one in table.__table__.columns if not one.nullable}
            if not needed <= row.keys() <= columns:
                return None
        return cls(store, experiment_id) if isinstance(store, SqlAlchemyStore) else None

    def _artifact_uri(self, run_id: str) -> str:
        return f"{self._artifacts}/{run_id}/{SqlAlchemyStore.ARTIFACTS_FOLDER_NAME}"

    def start(self, name: str, tags: Mapping[str, str], *, started: int) -> str:
        """Make a run; see `TrialRuns.start`."""
        run_id = uuid.uuid4().hex
        with self._store.ManagedSessionMaker(read_only=False) as session:
            self._insert_run(session, run_id, name, started=started)
            self._insert_texts(session, SqlTag, run_id, {**tags, _NAME_TAG: name})
        return run_id

    def finish(self, run_id: str | None, run: FinishedRun) -> str:
        """Write a run; see `TrialRuns.finish`."""
        started = run_id is not None
        run_id = run_id if run_id is not None else uuid.uuid4().hex
        self._save_artifacts(run_id, run)
        now = int(time.time() * 1000)
        with self._store.ManagedSessionMaker(read_only=False) as session:
            if started:
                self._end_run(session, run_id, run, now)
            else:
                begun = now - int(1000 * run.seconds)
                self._insert_run(session, run_id, run.name, started=begun, ended=now, status=run.status)
            self._insert_texts(session, SqlTag, run_id, {**run.tags, _NAME_TAG: run.name})
            self._insert_texts(session, SqlParam, run_id, run.params)
            self._insert_metrics(session, run_id, run.metrics, known=started)
        return run_id

    def mark(self, tag: str, values: Mapping[str, str]) -> None:
        """Change a tag; see `TrialRuns.mark`."""
        tags = SqlTag.__table__
        with self._store.ManagedSessionMaker(read_only=False) as session:
            for run_id, value in values.items():
                place = (tags.c.run_uuid == run_id) & (tags.c.key == tag)
                session.execute(tags.update().where(place).values(value=value))

    def _save_artifacts(self, run_id: str, run: FinishedRun) -> None:
        artifacts = get_artifact_repository(self._artifact_uri(run_id))
        if isinstance(artifacts, LocalArtifactRepository):
            place = Path(artifacts.artifact_dir)
            place.mkdir(parents=True, exist_ok=True)
            run.save(place)
            return
        with tempfile.TemporaryDirectory() as folder:
            run.save(Path(folder))
            artifacts.log_artifacts(folder)

    def _insert_run(
        self,
        session: Any,
        run_id: str,
        name: str,
        *,
        started: int,
        ended: int | None = None,
        status: str = "RUNNING",
    ) -> None:
        row = _run_row(run_id, self._experiment_id, name, self._artifact_uri(run_id), started)
        session.execute(SqlRun.__table__.insert(), [{**row, "status": status, "end_time": ended}])

    def _end_run(self, session: Any, run_id: str, run: FinishedRun, now: int) -> None:
        """End a run that was started, and make room for what it holds: it may have been paused before."""
        runs = SqlRun.__table__
        active = (runs.c.run_uuid == run_id) & (runs.c.lifecycle_stage == "active")
        ended = session.execute(runs.update().where(active).values(status=run.status, end_time=now))
        if ended.rowcount != 1:
            raise MlflowException(f"The run {run_id} was deleted while its trial was running.")
        for table, names in ((SqlTag.__table__, [*run.tags, _NAME_TAG]), (SqlParam.__table__, [*run.params])):
            session.execute(table.delete().where(table.c.run_uuid == run_id, table.c.key.in_(names)))

    def _insert_texts(self, session: Any, table: Any, run_id: str, texts: Mapping[str, str]) -> None:
        if texts:
            rows = [_text_row(run_id, *one) for one in texts.items()]
            session.execute(table.__table__.insert(), rows)

    def _insert_metrics(self, session: Any, run_id: str, metrics: Sequence[Metric], *, known: bool) -> None:
        """Insert metrics, each once, and what MLflow shows: a name's value at its highest step."""
        distinct = {(one.key, one.timestamp, one.step, one.value): one for one in metrics}
        latest: dict[str, Metric] = {}
        if known:
            table = SqlLatestMetric.__table__
            rows = session.execute(table.select().where(table.c.run_uuid == run_id)).mappings().all()
            latest = {
                one["key"]: Metric(one["key"], one["value"], one["timestamp"], one["step"]) for one in rows
            }
            session.execute(table.delete().where(table.c.run_uuid == run_id))
        for one in distinct.values():
            shown = latest.setdefault(one.key, one)
            if (one.step, one.timestamp, one.value) > (shown.step, shown.timestamp, shown.value):
                latest[one.key] = one
        for table, several in ((SqlMetric, distinct), (SqlLatestMetric, latest)):
            rows = [_metric_row(run_id, one) for one in several.values()]
            if rows:
                session.execute(table.__table__.insert(), rows)


def _run_row(run_id: str, experiment_id: int, name: str, artifacts: str, started: int) -> dict[str, Any]:
    """Return a new run as MLflow's store makes it."""
    return {
        "run_uuid": run_id,
        "name": name,
        "source_type": "UNKNOWN",
        "source_name": "",
        "entry_point_name": "",
        "user_id": "unknown",
        "status": "RUNNING",
        "start_time": started,
        "end_time": None,
        "deleted_time": None,
        "source_version": "",
        "lifecycle_stage": "active",
        "artifact_uri": artifacts,
        "experiment_id": experiment_id,
    }


def _text_row(run_id: str, name: str, value: str) -> dict[str, Any]:
    """Return a tag or a parameter."""
    return {"key": name, "value": value, "run_uuid": run_id}


def _metric_row(run_id: str, metric: Metric) -> dict[str, Any]:
    return {
        "key": metric.key,
        "value": metric.value,
        "timestamp": metric.timestamp,
        "step": metric.step,
        "is_nan": False,
        "run_uuid": run_id,
    }
