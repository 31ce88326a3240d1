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
from typing import Literal, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.profiling import TimeSpan, section
from autopeft.reporting.mlflow.run_backends import ClientRuns, DatabaseRuns, TrialRuns
from autopeft.reporting.mlflow.run_content import (
    KEY_PARAM,
    PARENT_TAG,
    PARETO_TAG,
    TRIAL_TAG,
    finished_run,
    front_markdown,
    shortened,
    started_run,
    training_tags,
    write_dataset,
    write_front,
    write_table,
)
from autopeft.reporting.mlflow.saved_view import save_view, valid_key, view_link, view_state
from autopeft.reporting.mlflow.store import checked_store, open_experiment
from autopeft.reporting.mlflow.write_queue import BackgroundWriter

_logger = logging.getLogger(__name__)
SEARCH_TAG = "autopeft.search"
VIEW_TAG = "autopeft.view"
_LONGEST_PARAM = 5000
_PAGE = 1000
_BATCH = 100
_CATCH_UP_EVERY_SECONDS = 2.0
_SHOW_AFTER_SECONDS = 1.0
_GATHER_SECONDS = 1.0
_MOST_GATHERED = 100
_FRONT_EVERY_SECONDS = 60.0
_FRONT_SHARE = 0.02  # of the time: page, picture and table grow with the trials
SHOW, _GATHERED = "show", "gathered"  # what is delayed
RunEnd = Literal["FINISHED", "KILLED", "FAILED"]


class _Over(NamedTuple):
    """A trial that is over, and when it was, in milliseconds of the clock."""

    record: TrialRecord
    ended: int


class Tracker:
    """Writes a search to MLflow from a thread of its own, so that training does not wait for it.

    What cannot be written is retried, then logged and counted, and never ends the search: the study holds
    everything, and `start` brings the runs in line with it.

    Args:
        uri: MLflow tracking URI, as in "sqlite:///mlflow.db" or "http://127.0.0.1:5000".
        experiment: Name of the experiment; made if it is not there.
        search_name: Name of the search; its parent run is found by it.
        objectives: The search's objectives.
        ui_url: Where the UI is (or will be) served, for the link.

    Raises:
        ValueError: The store cannot be written, or is a plain folder, which MLflow 3 refuses.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        search_name: str,
        objectives: Sequence[Objective],
        ui_url: str = "http://127.0.0.1:5000",
    ) -> None:
        self.objectives = tuple(objectives)
        self.search_name = search_name
        self._uri, self._artifacts = checked_store(uri)
        self._experiment = experiment
        self._ui_url = ui_url
        self._client: MlflowClient
        self._trial_runs: TrialRuns
        self._experiment_id = ""
        self._parent = ""
        self._view: str | None = None
        self._runs: dict[int, str] = {}
        self._points: dict[int, int] = {}  # of the curves that runs have
        self._finished: set[int] = set()  # trials over before they could be shown as running
        self._gathered: dict[int, _Over] = {}  # trials to be written together
        self._members: frozenset[int] = frozenset()  # of the front
        self._tagged: set[int] = set()  # whose runs say so
        self._waiting: list[Metric] = []
        self._caught_up = 0.0
        self._front_put = -math.inf  # when; the first trial is to be seen at once
        self._front_seconds = 0.0  # that writing it took
        self._writer = BackgroundWriter()

    @property
    def failures(self) -> int:
        """Entries that could not be written."""
        return self._writer.failures

    @property
    def worked(self) -> TimeSpan:
        """The time of the thread that writes."""
        return self._writer.worked

    @property
    def link(self) -> str:
        """The link that opens the UI on the scatter charts of this search's trials."""
        return view_link(self._ui_url, self._experiment_id, self._view)

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

        Args:
            note: What the search is, as text.
            identity: Groups of settings; "environment" may change between calls.
            records: The study's finished trials: those without a run get one, runs of trials that were
                interrupted are deleted.
            members: Those of them that are on the front.

        Raises:
            ValueError: MLflow cannot open the store.
        """
        if self._uri.startswith("http"):  # MLflow would print two lines a run that ends
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        try:
            self._client, self._experiment_id = open_experiment(self._uri, self._artifacts, self._experiment)
            database = DatabaseRuns.of(self._client, self._experiment_id)
            self._trial_runs = database or ClientRuns(self._client, self._experiment_id)
            self._open_parent(note, identity)
            missing = self._reconcile(records)
        except MlflowException as error:
            raise ValueError(f"MLflow cannot use the tracking store {self._uri!r}: {error}") from error
        self._view = save_view(self._client, self._experiment_id, view_state(self._parent, self.objectives))
        if self._view is not None:
            self._client.set_tag(self._parent, VIEW_TAG, self._view)
        self.front_changed(members)
        for record in missing:
            self.trial_finished(record)
        self._writer.start()

    def _search_runs(self, condition: str) -> list[Run]:
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                condition,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=_PAGE,
                page_token=token,
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def _open_parent(self, note: str, identity: Mapping[str, Mapping[str, str]]) -> None:
        settings = {key: group for key, group in identity.items() if key != "environment"}
        params = {
            valid_key(f"{group}.{key}"): shortened(value, _LONGEST_PARAM) or "none"
            for group, fields in settings.items()
            for key, value in fields.items()
        }
        known = self._find_parent(params)
        if known is not None:
            self._parent = str(known.info.run_id)
            self._client.update_run(self._parent, status="RUNNING")
        else:
            run = self._client.create_run(
                self._experiment_id, run_name=self.search_name, tags={SEARCH_TAG: self.search_name}
            )
            self._parent = str(run.info.run_id)
        if known is None or not known.data.params:
            entries = [Param(name, value) for name, value in params.items()]
            for start in range(0, len(entries), _BATCH):
                self._client.log_batch(self._parent, params=entries[start : start + _BATCH])
            write_dataset(self._client, self._parent, settings.get("task", {}))
        tags = {
            valid_key(f"environment.{key}"): shortened(value, _LONGEST_PARAM)
            for key, value in identity.get("environment", {}).items()
        }
        self._note = f"```\n{shortened(note, _LONGEST_PARAM // 2)}\n```"
        tags["mlflow.note.content"] = self._note
        self._client.log_batch(self._parent, tags=[RunTag(name, value) for name, value in tags.items()])
        self._client.log_dict(
            self._parent, {key: dict(one) for key, one in identity.items()}, "identity.json"
        )

    def _find_parent(self, params: Mapping[str, str]) -> Run | None:
        """Return the run of this search: of its name and with its settings (or, killed at birth, none).

        A search of the same name with other settings is another one, and keeps its runs.
        """
        for run in self._search_runs(f"tags.`{SEARCH_TAG}` LIKE '%'"):  # a name may hold quotes
            if run.data.tags[SEARCH_TAG] == self.search_name and run.data.params in ({}, params):
                return run
        return None

    def _reconcile(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Delete the runs that are not the study's, and return the records without a run."""
        known = {record.number: record for record in records}
        foreign = 0
        for run in self._search_runs(f"tags.`{PARENT_TAG}` = '{self._parent}'"):
            number = int(run.data.tags.get(TRIAL_TAG, -1))
            finished = run.info.status != "RUNNING"
            record = known.get(number)
            of_study = (
                record is not None and run.data.params.get(KEY_PARAM) == record.evaluation.configuration.key
            )
            # A paused trial may have gone on since its run was written.
            current = record is not None and training_tags(record).items() <= run.data.tags.items()
            if record is None or not (finished and of_study and current) or number in self._runs:
                foreign += finished and not of_study
                self._client.delete_run(run.info.run_id)
                continue
            self._runs[number] = str(run.info.run_id)
            self._points[number] = len(record.evaluation.curves)
            if run.data.tags.get(PARETO_TAG) == "true":
                self._tagged.add(number)
        if foreign:
            _logger.warning(
                "Deleted %d finished runs of %r in MLflow that its study does not know (`mlflow runs "
                "restore` brings them back until `mlflow gc`).",
                foreign,
                self.search_name,
            )
        return [record for record in records if record.number not in self._runs]

    def _write(self, trials: Sequence[_Over]) -> None:
        members, runs = self._members, []  # the search may change the front meanwhile
        for record, ended in trials:
            number, points = record.number, self._points.get(record.number, 0)
            run = finished_run(
                self._parent, record, on_front=number in members, known_points=points, ended=ended
            )
            runs.append((self._runs.get(number), run))
        for (record, _), run_id in zip(trials, self._trial_runs.finish(runs), strict=True):
            self._runs[record.number] = run_id
            self._points[record.number] = len(record.evaluation.curves)
            if record.number in members:
                self._tagged.add(record.number)
            else:
                self._tagged.discard(record.number)

    def _start_runs(self, trials: Mapping[int, Configuration], started: int) -> None:
        for number, configuration in trials.items():
            is_over = number in self._finished or self._writer.ending.is_set()
            if number not in self._runs and not is_over:
                name, tags = started_run(self._parent, number, configuration)
                self._runs[number] = self._trial_runs.start(name, tags, started=started)

    def trials_started(self, trials: Mapping[int, Configuration]) -> None:
        """Show trials as running, unless they are over in a second: their runs are then written at once.

        Args:
            trials: Configurations by number, of those that are trained together.
        """
        due, started = time.monotonic() + _SHOW_AFTER_SECONDS, int(time.time() * 1000)
        show = partial(self._start_runs, dict(trials), started)
        self._writer.put(partial(self._writer.delay, SHOW, due, show))

    def trial_finished(self, record: TrialRecord) -> None:
        """Write a trial's values, curves, cost, configuration and picture, and end its run."""
        self._finished.add(record.number)
        self._writer.put(partial(self._write_soon, _Over(record, int(time.time() * 1000))))

    def _write_soon(self, trial: _Over) -> None:
        """Write a trial; quick ones share a transaction, where there are any."""
        self._writer.drop(SHOW)  # those trained together are over together
        if not self._trial_runs.has_transactions:
            self._write([trial])
            return
        self._gathered[trial.record.number] = trial
        if len(self._gathered) >= _MOST_GATHERED:
            self._write_gathered()
        elif len(self._gathered) == 1:
            self._writer.delay(_GATHERED, time.monotonic() + _GATHER_SECONDS, self._write_gathered)

    def _write_gathered(self) -> None:
        """Write what was gathered; where that fails, each trial alone."""
        self._writer.drop(_GATHERED)
        trials, self._gathered = list(self._gathered.values()), {}
        if not trials:
            return
        try:
            self._write(trials)
        except Exception:
            _logger.debug("Trials could not be written together; each is written alone.", exc_info=True)
            self._writer.put_first([partial(self._write, [one]) for one in trials])

    def front_changed(self, members: Collection[int]) -> None:
        """Bring the tags that say which trials are on the front up to date."""
        self._members = frozenset(members)
        self._writer.put(self._catch_up)

    def progress(self, metrics: Mapping[str, float], step: int) -> None:
        """Write figures of the whole search, as hypervolume and cost, at a trial's number."""
        now = int(time.time() * 1000)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._waiting += [Metric(valid_key(name), value, now, step) for name, value in finite.items()]
        self._writer.put(self._catch_up)

    def _catch_up(self, *, at_once: bool = False) -> None:
        """Write the front's tags and the search's figures; quick trials share one write."""
        if not at_once and time.monotonic() - self._caught_up < _CATCH_UP_EVERY_SECONDS:
            return
        members = self._members
        changed = (self._tagged ^ members) & self._runs.keys()
        values = {self._runs[number]: str(number in members).lower() for number in sorted(changed)}
        if values:
            self._trial_runs.mark(PARETO_TAG, values)
            self._tagged ^= changed
        if waiting := list(self._waiting):
            self._trial_runs.add_metrics(self._parent, waiting)
            del self._waiting[: len(waiting)]
        self._caught_up = time.monotonic()  # only now: where it fails, it is tried again

    @property
    def is_front_due(self) -> bool:
        """Whether the front's page is a minute old, and writing it keeps to a fiftieth of the time."""
        age = time.monotonic() - self._front_put
        return age > max(_FRONT_EVERY_SECONDS, self._front_seconds / _FRONT_SHARE)

    def publish_front(self, records: Sequence[TrialRecord], members: Collection[int]) -> None:
        """Write the front's page, picture, table and the run's note."""
        self._front_put = time.monotonic()
        self._writer.put(partial(self._write_front, tuple(records), frozenset(members)))

    def _write_front(self, records: Sequence[TrialRecord], members: frozenset[int]) -> None:
        started = time.monotonic()
        write_front(self._client, self._parent, records, members, self.objectives)
        self._front_seconds = time.monotonic() - started
        note = f"{self._note}\n\n{front_markdown(records, members, self.objectives)}\n"
        self._client.set_tag(self._parent, "mlflow.note.content", note)

    def log_report(self, save: Callable[[Path], object], place: str) -> None:
        """Write the files that `save` puts into a folder to the search's run, below `place`."""
        self._writer.put(partial(self._write_report, save, place))

    def _write_report(self, save: Callable[[Path], object], place: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            self._client.log_artifacts(self._parent, folder, place)

    @section("log")
    def finish(self, status: RunEnd, records: Sequence[TrialRecord] = ()) -> None:
        """Write what is waiting, log the table of all trials, and end the search's run.

        A store that has stopped answering is given up once nothing has been written for a minute. A trial
        that was interrupted before it could be shown as running is not shown any more.
        """
        if not self._writer.is_alive:
            return
        last: list[Callable[[], None]] = [self._write_gathered, partial(self._catch_up, at_once=True)]
        if records:
            last.append(partial(self._write_table, tuple(records)))
        self._writer.finish([*last, partial(self._client.set_terminated, self._parent, status=status)])
        if self.failures:
            _logger.warning(
                "%d entries could not be written to MLflow; the study has them all, and the next call of "
                "the search writes them.",
                self.failures,
            )

    def _write_table(self, records: Sequence[TrialRecord]) -> None:
        write_table(self._client, self._parent, records, self._members, self.objectives)

    @section("log")
    def flush(self, patience_seconds: float = math.inf) -> None:
        """Wait until everything queued so far is written, or the patience is over."""
        self._writer.put(partial(self._writer.call_now, SHOW))
        self._writer.put(self._write_gathered)
        self._writer.put(partial(self._catch_up, at_once=True))
        self._writer.flush(patience_seconds)
