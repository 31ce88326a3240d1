"""Record a search in MLflow: a parent run, a child run a trial, the front, and a link to look at it."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.profiling import TimeSpan, section
from autopeft.reporting.mlflow.run_content import (
    STUDY_TAG,
    TRIAL_TAG,
    front_markdown,
    shortened,
    write_dataset,
    write_front,
    write_table,
)
from autopeft.reporting.mlflow.run_writer import RunWriter, log_metrics
from autopeft.reporting.mlflow.saved_view import save_view, valid_key, view_link, view_state
from autopeft.reporting.mlflow.store import check_server, checked_store, open_experiment
from autopeft.reporting.mlflow.tracking_uri import redact, redact_in
from autopeft.reporting.mlflow.worker import Job, Worker

_logger = logging.getLogger(__name__)
SEARCH_TAG = "autopeft.search"
VIEW_TAG = "autopeft.view"
_LONGEST_PARAM = 5000
_PAGE = 1000
_BATCH = 100
_FRONT_EVERY_SECONDS = 60.0
_FRONT_SHARE = 0.02  # of the time: page, picture and table grow with the trials
_PATIENCE_SECONDS = 60.0
RunEnd = Literal["FINISHED", "KILLED", "FAILED"]


class Tracker:
    """Writes a search to MLflow from a thread of its own, so that training does not wait for it.

    MLflow never fails a search: what cannot be written is logged. The study holds everything; at the end, and
    when the search goes on, the runs are brought in line with it. They are found by the study's id and never
    deleted.

    Args:
        uri: MLflow tracking URI, as in "sqlite:///mlflow.db" or "http://127.0.0.1:5000".
        experiment: Name of the experiment; made if it is not there.
        search_name: Name of the search, which others may share.
        study_id: A random id of the study, kept with it.
        objectives: The search's objectives.
        ui_url: Where the UI is (or will be) served, for the link; default: the store's server, or port 5000.

    Attributes:
        failures: How often something could not be written.

    Raises:
        ValueError: The store cannot be written, or is a plain folder, which MLflow 3 refuses.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        search_name: str,
        study_id: str,
        objectives: Sequence[Objective],
        ui_url: str | None = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.search_name = search_name
        self.study_id = study_id
        self._uri, self._artifacts = checked_store(uri)
        self._experiment = experiment
        is_server = self._uri.startswith("http")
        self._ui_url = ui_url or (redact(self._uri) if is_server else "http://127.0.0.1:5000")
        self._client: MlflowClient
        self._runs: RunWriter
        self._experiment_id = ""
        self._parent = ""
        self._note = ""
        self._view: str | None = None
        self._members: frozenset[int] = frozenset()  # of the front
        self._waiting: list[Metric] = []
        self._front_put = -math.inf  # when; the first trial is to be seen at once
        self._front_seconds = 0.0  # that writing it took
        self.failures = 0
        self._worker = Worker(self._on_failure)

    @property
    def worked(self) -> TimeSpan:
        """The time of the thread that writes."""
        return self._worker.worked

    @property
    def link(self) -> str:
        """The link that opens the UI on the scatter charts of this search's trials."""
        return view_link(self._ui_url, self._experiment_id, self._view) if self._parent else self._ui_url

    def _on_failure(self, error: Exception) -> None:
        self.failures += 1
        level = logging.WARNING if self.failures == 1 else logging.DEBUG
        message = "An entry could not be written to MLflow (%s: %s); more are counted."
        _logger.log(level, message, type(error).__name__, redact_in(error, self._uri))

    @section("log")
    def start(
        self,
        *,
        note: str,
        identity: Mapping[str, Mapping[str, str]],
        records: Sequence[TrialRecord],
        members: Collection[int] = (),
    ) -> None:
        """Find or create the search's run, and bring its trials' runs in line with the study.

        Where MLflow does not answer, a warning says so and nothing is recorded until the next call.

        Args:
            note: What the search is, as text.
            identity: Groups of settings; "environment" may change between calls.
            records: The study's finished trials; those without an up-to-date run get one.
            members: Those of them that are on the front.
        """
        try:
            self._open(note, identity, records)
        except Exception as error:
            _logger.warning(
                "The search is not recorded in MLflow, as the tracking store %s cannot be used (%s: %s). The "
                "study has everything: the next call of the search writes it.",
                redact(self._uri),
                type(error).__name__,
                redact_in(error, self._uri),
            )
            return
        self._worker.start()
        self.front_changed(members)
        for record in self._runs.behind(records):
            self.trial_finished(record)

    def _open(
        self, note: str, identity: Mapping[str, Mapping[str, str]], records: Sequence[TrialRecord]
    ) -> None:
        if self._uri.startswith("http"):
            check_server(self._uri)  # MLflow's client would try again for minutes
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines a run
        self._client, self._experiment_id = open_experiment(self._uri, self._artifacts, self._experiment)
        runs = self._search_runs()
        parents = [run for run in runs if SEARCH_TAG in run.data.tags]
        parent = self._open_parent(parents[0] if parents else None, note, identity)
        self._runs = RunWriter(self._client, self._experiment_id, parent, self.study_id, self.objectives)
        trials = [run for run in runs if TRIAL_TAG in run.data.tags]
        if foreign := self._runs.adopt(trials, records):
            _logger.warning(
                "MLflow has %d finished runs of %r that its study does not know; they stay as they are.",
                foreign,
                self.search_name,
            )
        self._view = save_view(self._client, self._experiment_id, view_state(parent, self.objectives))
        if self._view is not None:
            self._client.set_tag(parent, VIEW_TAG, self._view)
        self._parent = parent  # from here on there is something to write to

    def _search_runs(self) -> list[Run]:
        """Return all runs of this study."""
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                f"tags.`{STUDY_TAG}` = '{self.study_id}'",
                max_results=_PAGE,
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _open_parent(self, known: Run | None, note: str, identity: Mapping[str, Mapping[str, str]]) -> str:
        settings = {key: group for key, group in identity.items() if key != "environment"}
        if known is not None:
            parent = str(known.info.run_id)
            self._client.update_run(parent, status="RUNNING")
        else:
            tags = {SEARCH_TAG: self.search_name, STUDY_TAG: self.study_id}
            run = self._client.create_run(self._experiment_id, run_name=self.search_name, tags=tags)
            parent = str(run.info.run_id)
        if known is None or not known.data.params:
            params = [
                Param(valid_key(f"{group}.{key}"), shortened(value, _LONGEST_PARAM) or "none")
                for group, fields in settings.items()
                for key, value in fields.items()
            ]
            for start in range(0, len(params), _BATCH):
                self._client.log_batch(parent, params=params[start : start + _BATCH])
            write_dataset(self._client, parent, settings.get("task", {}))
        tags = {
            valid_key(f"environment.{key}"): shortened(value, _LONGEST_PARAM)
            for key, value in identity.get("environment", {}).items()
        }
        self._note = f"```\n{shortened(note, _LONGEST_PARAM // 2)}\n```"
        tags["mlflow.note.content"] = self._note
        self._client.log_batch(parent, tags=[RunTag(name, value) for name, value in tags.items()])
        self._client.log_dict(parent, {key: dict(group) for key, group in identity.items()}, "identity.json")
        return parent

    def _put(self, job: Job) -> None:
        if self._worker.is_alive():
            self._worker.put(job)

    def trials_started(self, trials: Mapping[int, Configuration]) -> None:
        """Show trials as running.

        Args:
            trials: Configurations by number, of those that are trained together.
        """
        self._put(partial(self._start_runs, dict(trials), _milliseconds()))

    def _start_runs(self, trials: Mapping[int, Configuration], started: int) -> None:
        for number, configuration in trials.items():
            self._runs.start(number, configuration, started)

    def trial_finished(self, record: TrialRecord) -> None:
        """Write a trial's values, curves, cost, configuration and picture, and end its run."""
        now = _milliseconds()
        self._put(lambda: self._runs.finish(record, self._members, now))

    def front_changed(self, members: Collection[int]) -> None:
        """Bring the tags that say which trials are on the front up to date."""
        self._members = frozenset(members)
        self._put(lambda: self._runs.mark(self._members))

    def progress(self, metrics: Mapping[str, float], step: int) -> None:
        """Write figures of the whole search, as hypervolume and cost, at a trial's number."""
        now = _milliseconds()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._waiting += [Metric(valid_key(name), value, now, step) for name, value in finite.items()]
        self._put(self._write_progress)

    def _write_progress(self) -> None:
        waiting = list(self._waiting)
        log_metrics(self._client, self._parent, waiting)
        del self._waiting[: len(waiting)]

    @property
    def is_front_due(self) -> bool:
        """Whether the front's page is a minute old, and writing it keeps to a fiftieth of the time."""
        age = time.monotonic() - self._front_put
        return age > max(_FRONT_EVERY_SECONDS, self._front_seconds / _FRONT_SHARE)

    def publish_front(self, records: Sequence[TrialRecord], members: Collection[int]) -> None:
        """Write the front's page, picture, table and the run's note."""
        self._front_put = time.monotonic()
        self._put(partial(self._write_front, tuple(records), frozenset(members)))

    def _write_front(self, records: Sequence[TrialRecord], members: frozenset[int]) -> None:
        started = time.monotonic()
        write_front(self._client, self._parent, records, members, self.objectives)
        self._front_seconds = time.monotonic() - started
        note = f"{self._note}\n\n{front_markdown(records, members, self.objectives)}\n"
        self._client.set_tag(self._parent, "mlflow.note.content", note)

    def log_report(self, save: Callable[[Path], object], place: str) -> None:
        """Write the files that `save` puts into a folder to the search's run, below `place`."""
        self._put(partial(self._write_report, save, place))

    def _write_report(self, save: Callable[[Path], object], place: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            self._client.log_artifacts(self._parent, folder, place)

    @section("log")
    def finish(self, status: RunEnd, records: Sequence[TrialRecord] = ()) -> None:
        """Write what is waiting, log the table of all trials, and end the search's run.

        What is still missing is tried once more. A store that has stopped answering is given up once nothing
        has been written for a minute.
        """
        if not self._worker.is_alive():
            return
        if self._worker.flush(_PATIENCE_SECONDS):
            for record in self._runs.behind(records):
                self.trial_finished(record)
            self._put(self._runs.end_unfinished)
            if records:
                trials, members = tuple(records), self._members
                table = partial(write_table, self._client, self._parent, trials, members, self.objectives)
                self._put(table)
            self._put(partial(self._client.set_terminated, self._parent, status=status))
        if not self._worker.stop(_PATIENCE_SECONDS) or self._runs.behind(records):
            _logger.warning(
                "%d trials could not be written to MLflow; the study has them all, and the next call of the "
                "search writes them.",
                len(self._runs.behind(records)),
            )

    @section("log")
    def flush(self, patience_seconds: float = math.inf) -> None:
        """Wait until everything so far is written, or nothing has been for as long as the patience."""
        self._worker.flush(patience_seconds)


def _milliseconds() -> int:
    return int(time.time() * 1000)
