"""Record a search in MLflow: a parent run, a child run a trial, the front, and a link to look at it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Run

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.profiling import section
from autopeft.core.tables import markdown_block
from autopeft.reporting.frame import front_frame
from autopeft.reporting.front import ParetoFront
from autopeft.reporting.front_plots import static_front_figure
from autopeft.reporting.mlflow import run_content as content
from autopeft.reporting.mlflow.run_writer import RunWriter, log_in_batches
from autopeft.reporting.mlflow.saved_view import (
    HYPERVOLUME_KEY,
    TIME_KEY,
    save_view,
    valid_key,
    view_link,
    view_state,
)
from autopeft.reporting.mlflow.store import checked_store, log_folder, open_experiment
from autopeft.reporting.mlflow.tracking_uri import redact, redact_in
from autopeft.reporting.mlflow.worker import Worker
from autopeft.reporting.tracker import SettingGroups, Tracker

_logger = logging.getLogger(__name__)
_MOST_RUNS = 50_000  # MLflow's limit
_FRONT_EVERY_SECONDS = 60.0
_FRONT_SHARE = 0.02  # of the time: page, picture and table grow with the trials
_PATIENCE_SECONDS = 60.0
_SECONDS_A_RUN = 0.02  # that a server may take to list what a search has written


class MlflowTracker(Tracker):
    """Writes a search to MLflow from a thread of its own, so that training does not wait for it.

    What cannot be written is logged, and fails no search. The study holds everything; at the end, and
    when the search goes on, the runs are brought in line with it, found by its id. None is deleted.

    Args:
        uri: MLflow tracking URI, as in "sqlite:///mlflow.db" or "http://127.0.0.1:5000".
        experiment: Name of the experiment; made if it is not there.
        search_name: Name of the search, which others may share.
        study_id: A random id of the study, kept with it.
        objectives: The search's objectives.

    Attributes:
        store: The tracking URI without credentials.
        is_server: Whether it is a server's address.
        failures: How often something could not be written.
        link: Opens the UI, of the store's server or on port 5000; once begun, on the charts of the trials.
        worked: The time of the thread that writes.

    Raises:
        ValueError: The store is of a kind that MLflow does not write, or a local one that cannot be written.
    """

    def __init__(
        self,
        uri: str,
        *,
        experiment: str,
        search_name: str,
        study_id: str,
        objectives: Sequence[Objective],
    ) -> None:
        self._objectives = tuple(objectives)
        self._search_name = search_name
        self._study_id = study_id
        self._uri, self._artifacts = checked_store(uri)
        self._experiment = experiment
        self.store = redact(uri)
        self.is_server = uri.startswith("http")
        self.link = self.store if self.is_server else "http://127.0.0.1:5000"
        self._client: MlflowClient
        self._runs: RunWriter
        self._parent = ""
        self._note = ""
        self._members: frozenset[int] = frozenset()  # of the front
        self._knee: int | None = None
        self._waiting: list[Metric] = []
        self._figures: Mapping[str, float] = {}  # of the search, after the latest evaluation
        self._front_put = -math.inf  # when; the first trial is to be seen at once
        self._front_seconds = 0.0  # that writing it took
        self.failures = 0
        self._worker = Worker(self._on_failure)
        self.worked = self._worker.worked

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
        identity: SettingGroups,
        records: Sequence[TrialRecord],
        members: Collection[int] = (),
    ) -> None:
        """Find or create the search's run, and bring its trials' runs in line with the study.

        Where MLflow does not answer within a minute, and 20 ms a record, a warning says so and nothing is
        recorded until the next call.
        """
        outcome: list[Exception | None] = []

        def try_to_open() -> None:
            try:
                self._open(note, identity, records)
                outcome.append(None)
            except Exception as error:
                outcome.append(error)

        # By the thread, as MLflow's client tries for long where a server keeps connections and is silent.
        self._worker.start()
        self._worker.put(try_to_open)
        patience = _PATIENCE_SECONDS + _SECONDS_A_RUN * len(records)
        try:
            self._worker.flush(patience)
        finally:  # also where Ctrl-C ends the waiting
            error = outcome[0] if outcome else TimeoutError(f"no answer in {patience:.0f} s")
            if error is not None:
                self._worker.stop(0)
        if error is not None:
            _logger.warning(
                "The search is not recorded in MLflow, as the tracking store %s cannot be used (%s: %s). The "
                "study has everything: the next call of the search writes it.",
                self.store,
                type(error).__name__,
                redact_in(error, self._uri),
            )
            return
        self.front_changed(members)
        for record in self._runs.behind(records):
            self.trial_finished(record)

    def _open(self, note: str, identity: SettingGroups, records: Sequence[TrialRecord]) -> None:
        self._client, experiment_id = open_experiment(self._uri, self._artifacts, self._experiment)
        of_this_study = f"tags.`{content.STUDY_TAG}` = '{self._study_id}'"
        # By a filter of its own: it is the oldest run, and may be beyond the latest so many.
        of_the_search = f"{of_this_study} AND tags.`{content.SEARCH_TAG}` LIKE '%'"
        parents = self._client.search_runs([experiment_id], of_the_search, max_results=1)
        runs = self._client.search_runs([experiment_id], of_this_study, max_results=_MOST_RUNS)
        if not self._worker.takes_jobs:
            raise TimeoutError("the answer came too late")
        self._parent = self._open_parent(experiment_id, next(iter(parents), None), note, identity)
        tags = {content.PARENT_TAG: self._parent, content.STUDY_TAG: self._study_id}
        names = {"search_name": self._search_name, "backbone": identity.get("backbone", {}).get("name", "")}
        self._runs = RunWriter(self._client, experiment_id, tags, self._objectives, **names)
        trials = [run for run in runs if content.TRIAL_TAG in run.data.tags]
        if foreign := self._runs.adopt(trials, records):
            _logger.warning(
                "MLflow has %d finished runs of %r that its study does not know; they stay as they are.",
                foreign,
                self._search_name,
            )
        view = save_view(self._client, experiment_id, view_state(self._parent, self._objectives))
        if view is not None:
            self._client.set_tag(self._parent, content.VIEW_TAG, view)
        self.link = view_link(self.link, experiment_id, view)

    def _open_parent(self, experiment_id: str, known: Run | None, note: str, identity: SettingGroups) -> str:
        if known is None:
            tags = {content.SEARCH_TAG: self._search_name, content.STUDY_TAG: self._study_id}
            known = self._client.create_run(experiment_id, run_name=self._search_name, tags=tags)
        parent = str(known.info.run_id)
        self._client.update_run(parent, status="RUNNING")
        settings = {group: fields for group, fields in identity.items() if group != "environment"}
        if not known.data.params:
            log_in_batches(self._client, parent, params=content.search_params(settings))
            data = DatasetInput(dataset=content.dataset(settings.get("task", {})), tags=[])
            self._client.log_inputs(parent, datasets=[data])
        self._note = markdown_block(content.shortened(note, content.LONGEST_TEXT // 2))
        environment = content.search_params({"environment": identity.get("environment", {})})
        log_in_batches(self._client, parent, tags={**environment, content.NOTE_TAG: self._note})
        everything = {group: dict(fields) for group, fields in identity.items()}
        self._client.log_dict(parent, everything, "identity.json")
        return parent

    def trial_started(self, number: int, configuration: Configuration) -> None:
        """Show a trial as running."""
        now = _milliseconds()
        self._worker.put(lambda: self._runs.start(number, configuration, now))

    def trial_finished(self, record: TrialRecord) -> None:
        """Write a trial's values, curves, cost, configuration and picture, and end its run."""
        now, figures = _milliseconds(), self._figures
        self._worker.put(lambda: self._runs.finish(record, self._members, now, figures, self._knee))

    def front_changed(self, members: Collection[int]) -> None:
        """Bring the tags that say which trials are on the front up to date."""
        self._members = frozenset(members)
        self._worker.put(lambda: self._runs.mark(self._members, self._knee))

    def knee_changed(self, number: int) -> None:
        """Mark the run of the trial that is the front's knee."""
        if number != self._knee:
            self._knee = number
            self._worker.put(lambda: self._runs.mark(self._members, self._knee))

    def progress(self, metrics: Mapping[str, float], step: int) -> None:
        """Write figures of the whole search, as hypervolume and cost, at a trial's number."""
        now = _milliseconds()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        shown = {HYPERVOLUME_KEY: "hypervolume", TIME_KEY: "cost/wall_seconds"}
        self._figures = {key: finite[name] for key, name in shown.items() if name in finite}
        self._waiting += [Metric(valid_key(name), value, now, step) for name, value in finite.items()]
        self._worker.put(self._write_progress)

    def _write_progress(self) -> None:
        waiting = list(self._waiting)
        log_in_batches(self._client, self._parent, metrics=waiting)
        del self._waiting[: len(waiting)]  # what failed is written with the next

    @property
    def is_front_due(self) -> bool:
        """Whether the front's page is a minute old, and writing it keeps to a fiftieth of the time."""
        age = time.monotonic() - self._front_put
        return age > max(_FRONT_EVERY_SECONDS, self._front_seconds / _FRONT_SHARE)

    def publish_front(self, front: ParetoFront) -> None:
        """Write the front's page, picture, table and the run's note."""
        self._front_put = time.monotonic()
        self._worker.put(partial(self._write_front, front))

    def _write_front(self, found: ParetoFront) -> None:
        started = time.monotonic()
        shown = found.records, found.members, found.objectives
        page, frame = found.to_html(), front_frame(*shown)
        front = frame[frame["front"]].drop(columns="front")
        self._client.log_text(self._parent, page, content.FRONT_PAGE)
        self._client.log_figure(self._parent, static_front_figure(*shown), "pareto/front.png")
        self._client.log_text(self._parent, front.to_csv(index=False), "pareto/front.csv")
        self._client.log_text(self._parent, frame.to_csv(index=False), "pareto/trials.csv")
        self._front_seconds = time.monotonic() - started
        note = f"{self._note}\n\n{content.front_markdown(*shown)}\n"
        self._client.set_tag(self._parent, content.NOTE_TAG, note)

    def _write_table(self, records: Sequence[TrialRecord], members: frozenset[int]) -> None:
        """Write the table of all trials, which MLflow's UI can compare between searches."""
        # log_table appends to a file that is there: a file a number of trials, written once.
        again = sum(record.evaluation.trainings - 1 for record in records)
        path = f"pareto/trials_{len(records):05d}{f'_and_{again}_again' if again else ''}.json"
        if path not in {file.path for file in self._client.list_artifacts(self._parent, "pareto")}:
            self._client.log_table(self._parent, front_frame(records, members, self._objectives), path)

    def log_report(self, save: Callable[[Path], object], place: str) -> None:
        """Write the files that `save` puts into a folder to the search's run, below `place`."""
        self._worker.put(lambda: log_folder(self._client, self._parent, save, place))

    @section("log")
    def finish(self, status: str, records: Sequence[TrialRecord] = ()) -> None:
        """Write what is waiting, log the table of all trials, and end the search's run with a status.

        What is still missing is tried once more. A store that has stopped answering is given up once nothing
        has been written for a minute.
        """
        if not self._worker.takes_jobs:
            return
        if answers := self._worker.flush(_PATIENCE_SECONDS):
            for record in self._runs.behind(records):
                self.trial_finished(record)
            self._worker.put(self._runs.end_unfinished)
            if records:
                self._worker.put(partial(self._write_table, tuple(records), self._members))
            self._worker.put(partial(self._client.set_terminated, self._parent, status=status))
        is_done = self._worker.stop(_PATIENCE_SECONDS if answers else 0)
        missing = len(self._runs.behind(records))
        if missing or not is_done:
            _logger.warning(
                "%d trials could not be written to MLflow; the study has them all, and the next call of the "
                "search writes them.",
                missing,
            )

    def links(self) -> Sequence[str]:
        """Return lines that say where the search is shown."""
        served = () if self.is_server else (f"        (served by: autopeft ui --tracking {self.store})",)
        return (f"MLflow: {self.link}", *served)

    @section("log")
    def flush(self) -> None:
        """Wait until everything so far is written, or nothing has been for a minute."""
        self._worker.flush(_PATIENCE_SECONDS)


def _milliseconds() -> int:
    return int(time.time() * 1000)
