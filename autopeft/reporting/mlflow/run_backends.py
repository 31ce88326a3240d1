"""How a trial becomes an MLflow run: through MLflow's client, or in one transaction where the store is local.

The client takes a trial in seven transactions and some fifty statements, as it cannot know that the run is
new. Where MLflow itself writes to a database, `DatabaseRuns` writes the same rows to the same tables in one
transaction, for several runs at once, which is also safer: a run is either there with everything or not.
Tables are no documented interface: what depends on them is here, `DatabaseRuns.of` looks whether they are
those it knows, and `tests/reporting/test_run_backends.py` compares its runs with the client's.
"""

from __future__ import annotations

import tempfile
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
from sqlalchemy import select

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
        ended: When it was over, in milliseconds of the clock.
        save: Writes the run's artifacts into a folder.
    """

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Sequence[Metric]
    status: str
    seconds: float
    ended: int
    save: Callable[[Path], None]

    @property
    def begun(self) -> int:
        """When the trial began."""
        return self.ended - int(1000 * self.seconds)


class TrialRuns(ABC):
    """Writes the runs of trials to one experiment.

    Attributes:
        has_transactions: Whether several runs are written together or not at all, and more quickly so.
    """

    has_transactions: bool

    @abstractmethod
    def start(self, name: str, tags: Mapping[str, str], *, started: int) -> str:
        """Make a run that is shown as running since a time in milliseconds, and return its id."""

    @abstractmethod
    def finish(self, runs: Sequence[tuple[str | None, FinishedRun]]) -> list[str]:
        """Write what runs hold and end them; make those that were not started. Return their ids.

        Args:
            runs: Each with its id, or None where it was not started.
        """

    @abstractmethod
    def add_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Write metrics to a run that is there, of any number; those that it has stay as they are."""

    @abstractmethod
    def mark(self, tag: str, values: Mapping[str, str]) -> None:
        """Give runs, by their ids, a new value of a tag that they have."""


class ClientRuns(TrialRuns):
    """Writes runs to any store that MLflow's client can reach.

    Args:
        client: The client.
        experiment_id: The experiment.
    """

    has_transactions = False

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self._client = client
        self._experiment_id = experiment_id

    def start(self, name: str, tags: Mapping[str, str], *, started: int) -> str:
        """Make a run; see `TrialRuns.start`."""
        run = self._client.create_run(self._experiment_id, started, dict(tags), name)
        return str(run.info.run_id)

    def finish(self, runs: Sequence[tuple[str | None, FinishedRun]]) -> list[str]:
        """Write runs; see `TrialRuns.finish`."""
        return [self._finish(*one) for one in runs]

    def _finish(self, run_id: str | None, run: FinishedRun) -> str:
        if run_id is None:
            new = self._client.create_run(self._experiment_id, run.begun, dict(run.tags), run.name)
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
        self._client.set_terminated(run_id, status=run.status, end_time=run.ended)
        return run_id

    def add_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Write metrics; see `TrialRuns.add_metrics`."""
        for start in range(0, len(metrics), _METRICS_A_BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_BATCH])

    def mark(self, tag: str, values: Mapping[str, str]) -> None:
        """Change a tag; see `TrialRuns.mark`."""
        for run_id, value in values.items():
            self._client.set_tag(run_id, tag, value)


class DatabaseRuns(TrialRuns):
    """Writes runs to the database of a store in this process.

    Args:
        store: MLflow's store.
        experiment_id: The experiment.
    """

    has_transactions = True

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
        run_id, rows = uuid.uuid4().hex, _Rows()
        rows.add(SqlRun, [self._run_row(run_id, name, started)])
        rows.add_texts(SqlTag, run_id, {**tags, _NAME_TAG: name})
        with self._store.ManagedSessionMaker(read_only=False) as session:
            rows.insert(session)
        return run_id

    def finish(self, runs: Sequence[tuple[str | None, FinishedRun]]) -> list[str]:
        """Write runs in one transaction; see `TrialRuns.finish`."""
        ids = [uuid.uuid4().hex if known is None else known for known, _ in runs]
        for run_id, (_, run) in zip(ids, runs, strict=True):
            self._save_artifacts(run_id, run)
        rows = _Rows()
        with self._store.ManagedSessionMaker(read_only=False) as session:
            for run_id, (known, run) in zip(ids, runs, strict=True):
                if known is None:
                    row = self._run_row(run_id, run.name, run.begun)
                    rows.add(SqlRun, [{**row, "status": run.status, "end_time": run.ended}])
                    latest: dict[str, Metric] = {}
                else:
                    self._end_run(session, run_id, run)
                    latest = _take_latest(session, run_id)
                rows.add_texts(SqlTag, run_id, {**run.tags, _NAME_TAG: run.name})
                rows.add_texts(SqlParam, run_id, run.params)
                rows.add_metrics(run_id, run.metrics, latest)
            rows.insert(session)
        return ids

    def add_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Write metrics; see `TrialRuns.add_metrics`."""
        known, rows = SqlMetric.__table__.c, _Rows()
        since = min((one.timestamp for one in metrics), default=0)
        with self._store.ManagedSessionMaker(read_only=False) as session:
            if session.execute(SqlRun.__table__.select().where(_is_active(run_id))).first() is None:
                raise MlflowException(f"The run {run_id} was deleted.")
            columns = select(known.key, known.timestamp, known.step, known.value)
            found = session.execute(columns.where(known.run_uuid == run_id, known.timestamp >= since))
            there = {tuple(one) for one in found}
            new = [one for one in metrics if _identity(one) not in there]
            rows.add_metrics(run_id, new, _take_latest(session, run_id))
            rows.insert(session)

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

    def _run_row(self, run_id: str, name: str, started: int) -> dict[str, Any]:
        return _run_row(run_id, self._experiment_id, name, self._artifact_uri(run_id), started)

    def _end_run(self, session: Any, run_id: str, run: FinishedRun) -> None:
        """End a run that was started, and make room for what it holds: it may have been paused before."""
        update = SqlRun.__table__.update().where(_is_active(run_id))
        ended = session.execute(update.values(status=run.status, end_time=run.ended))
        if ended.rowcount != 1:
            raise MlflowException(f"The run {run_id} was deleted while its trial was running.")
        for table, names in ((SqlTag.__table__, [*run.tags, _NAME_TAG]), (SqlParam.__table__, [*run.params])):
            session.execute(table.delete().where(table.c.run_uuid == run_id, table.c.key.in_(names)))


class _Rows:
    """Rows of several runs to insert, with one statement a table."""

    def __init__(self) -> None:
        tables = (SqlRun, SqlTag, SqlParam, SqlMetric, SqlLatestMetric)  # the others refer to runs
        self._rows: dict[Any, list[dict[str, Any]]] = {one: [] for one in tables}

    def add(self, table: Any, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows of a table."""
        self._rows[table] += rows

    def add_texts(self, table: Any, run_id: str, texts: Mapping[str, str]) -> None:
        """Add a run's tags or parameters."""
        self.add(table, [_text_row(run_id, *one) for one in texts.items()])

    def add_metrics(self, run_id: str, metrics: Sequence[Metric], latest: Mapping[str, Metric]) -> None:
        """Add a run's metrics, each once, and what MLflow shows: a name's value at its highest step.

        Args:
            run_id: The run.
            metrics: Its new metrics.
            latest: What was shown of it so far, by name.
        """
        distinct = {_identity(one): one for one in metrics}
        shown = dict(latest)
        for one in distinct.values():
            other = shown.setdefault(one.key, one)
            if (one.step, one.timestamp, one.value) > (other.step, other.timestamp, other.value):
                shown[one.key] = one
        self.add(SqlMetric, [_metric_row(run_id, one) for one in distinct.values()])
        self.add(SqlLatestMetric, [_metric_row(run_id, one) for one in shown.values()])

    def insert(self, session: Any) -> None:
        """Insert all rows."""
        for table, rows in self._rows.items():
            if rows:
                session.execute(table.__table__.insert(), rows)


def _is_active(run_id: str) -> Any:
    """Return the condition for a run that is there and not deleted."""
    runs = SqlRun.__table__.c
    return (runs.run_uuid == run_id) & (runs.lifecycle_stage == "active")


def _identity(metric: Metric) -> tuple[str, int, int, float]:
    """Return what a run has once."""
    return metric.key, metric.timestamp, metric.step, metric.value


def _take_latest(session: Any, run_id: str) -> dict[str, Metric]:
    """Take out what MLflow shows of a run's metrics, and return it by name."""
    table = SqlLatestMetric.__table__
    rows = session.execute(table.select().where(table.c.run_uuid == run_id)).mappings().all()
    session.execute(table.delete().where(table.c.run_uuid == run_id))
    return {one["key"]: Metric(one["key"], one["value"], one["timestamp"], one["step"]) for one in rows}


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
