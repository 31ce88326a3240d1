"""Record a search in MLflow: a parent run, a child run a trial, the front, and a link to look at it."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException

from autopeft.configuration import Configuration
from autopeft.evaluation import TrialRecord
from autopeft.mlflow_view import save_view, view_link, view_state
from autopeft.objectives import Objective
from autopeft.plots import front_figure, front_frame, front_image, save_front_html
from autopeft.run_writer import (
    PARENT_TAG,
    PARETO_TAG,
    TRIAL_TAG,
    create_trial_run,
    shortened,
    write_trial,
)

_logger = logging.getLogger(__name__)
SEARCH_TAG = "autopeft.search"
VIEW_TAG = "autopeft.view"
_LONGEST_PARAM = 5000
_ATTEMPTS = 4
_PAGE = 1000
RunEnd = Literal["FINISHED", "KILLED", "FAILED"]


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
        self._uri = uri
        self._experiment = experiment
        self._ui_url = ui_url
        self._artifacts = _artifact_location(uri)
        self._client: MlflowClient
        self._experiment_id = ""
        self._parent = ""
        self._view: str | None = None
        self._runs: dict[int, str] = {}
        self._members: set[int] = set()
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self.failures = 0

    @property
    def link(self) -> str:
        """The link that opens the UI on the scatter charts of this search's trials."""
        return view_link(self._ui_url, self._experiment_id, self._view)

    def start(
        self,
        *,
        note: str,
        identity: Mapping[str, Mapping[str, str]],
        records: Sequence[TrialRecord],
    ) -> None:
        """Find or create the search's run, and bring its trials' runs in line with the study.

        Args:
            note: What the search is, as text.
            identity: Groups of settings; "environment" may change between calls.
            records: The study's finished trials: those without a run get one, runs of trials that were
                interrupted are deleted.

        Raises:
            ValueError: MLflow cannot open the store.
        """
        try:
            self._client = MlflowClient(tracking_uri=self._uri)
            self._experiment_id = self._open_experiment()
            self._open_parent(note, identity)
        except MlflowException as error:
            raise ValueError(f"MLflow cannot use the tracking store {self._uri!r}: {error}") from error
        self._view = save_view(self._client, self._experiment_id, view_state(self._parent, self.objectives))
        if self._view is not None:
            self._client.set_tag(self._parent, VIEW_TAG, self._view)
        self._reconcile(records)
        self._thread = threading.Thread(target=self._work, name="autopeft-tracker", daemon=True)
        self._thread.start()

    def _open_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(self._experiment, artifact_location=self._artifacts))
        except MlflowException:  # another search made it in the meantime
            found = self._client.get_experiment_by_name(self._experiment)
            if found is None:
                raise
            return str(found.experiment_id)

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
        found = self._search_runs(f"tags.`{SEARCH_TAG}` = '{self.search_name}'")
        if found:
            self._parent = str(found[0].info.run_id)
            self._client.update_run(self._parent, status="RUNNING")
        else:
            run = self._client.create_run(
                self._experiment_id, run_name=self.search_name, tags={SEARCH_TAG: self.search_name}
            )
            self._parent = str(run.info.run_id)
            settings = {key: group for key, group in identity.items() if key != "environment"}
            params = [
                Param(f"{group}.{key}", shortened(value, _LONGEST_PARAM) or "none")
                for group, fields in settings.items()
                for key, value in fields.items()
            ]
            self._client.log_batch(self._parent, params=params)
            self._log_dataset(settings.get("task", {}))
        tags = [RunTag(f"environment.{key}", value) for key, value in identity.get("environment", {}).items()]
        tags.append(RunTag("mlflow.note.content", f"```\n{note}\n```"))
        self._client.log_batch(self._parent, tags=tags)
        self._client.log_dict(
            self._parent, {key: dict(one) for key, one in identity.items()}, "identity.json"
        )
        self._note = note

    def _log_dataset(self, task: Mapping[str, str]) -> None:
        name = task.get("dataset", "data")
        content = task.get("content", json.dumps(dict(task), sort_keys=True))
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        source = json.dumps({"uri": name})
        dataset = Dataset(name=Path(name).name, digest=digest, source_type="local", source=source)
        self._client.log_inputs(self._parent, datasets=[DatasetInput(dataset=dataset, tags=[])])

    def _reconcile(self, records: Sequence[TrialRecord]) -> None:
        known = {record.number for record in records}
        for run in self._search_runs(f"tags.`{PARENT_TAG}` = '{self._parent}'"):
            number = int(run.data.tags.get(TRIAL_TAG, -1))
            if number not in known or number in self._runs or run.info.status == "RUNNING":
                self._client.delete_run(run.info.run_id)
                continue
            self._runs[number] = str(run.info.run_id)
            if run.data.tags.get(PARETO_TAG) == "true":
                self._members.add(number)
        for record in records:
            if record.number not in self._runs:
                self._write(record)

    def _write(self, record: TrialRecord) -> None:
        number = record.number
        if number not in self._runs:
            self._start_run(number, record.evaluation.configuration)
        write_trial(self._client, self._runs[number], record, on_front=number in self._members)

    def _start_run(self, number: int, configuration: Configuration) -> None:
        self._runs[number] = create_trial_run(
            self._client, self._experiment_id, self._parent, number, configuration
        )

    def trial_started(self, number: int, configuration: Configuration) -> None:
        """Show a trial as running."""
        self._queue.put(partial(self._start_run, number, configuration))

    def trial_finished(self, record: TrialRecord) -> None:
        """Write a trial's values, curves, cost, configuration and picture, and end its run."""
        self._queue.put(partial(self._write, record))

    def front_changed(self, members: Collection[int]) -> None:
        """Bring the tags that say which trials are on the front up to date."""
        self._queue.put(partial(self._tag_members, frozenset(members)))

    def _tag_members(self, members: frozenset[int]) -> None:
        for number in sorted(self._members ^ members):
            if number in self._runs:
                self._client.set_tag(self._runs[number], PARETO_TAG, str(number in members).lower())
        self._members = set(members)

    def progress(self, metrics: Mapping[str, float], step: int) -> None:
        """Write figures of the whole search, as hypervolume and cost, at a trial's number."""
        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._queue.put(partial(self._log_progress, batch))

    def _log_progress(self, batch: Sequence[Metric]) -> None:
        self._client.log_batch(self._parent, metrics=batch)

    def publish_front(self, records: Sequence[TrialRecord], members: Collection[int]) -> None:
        """Write the front's page, picture, table and the run's note."""
        self._queue.put(partial(self._write_front, tuple(records), frozenset(members)))

    def _write_front(self, records: Sequence[TrialRecord], members: frozenset[int]) -> None:
        frame = front_frame(records, members, self.objectives)
        front = frame[frame["front"]].drop(columns="front")
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            save_front_html(front_figure(records, members, self.objectives), place / "front.html")
            (place / "front.png").write_bytes(front_image(records, members, self.objectives))
            front.to_csv(place / "front.csv", index=False)
            frame.to_csv(place / "trials.csv", index=False)
            self._client.log_artifacts(self._parent, folder, "pareto")
        note = f"```\n{self._note}\n```\n\n{self._front_markdown(records, members)}\n"
        self._client.set_tag(self._parent, "mlflow.note.content", shortened(note, _LONGEST_PARAM))

    def _front_markdown(self, records: Sequence[TrialRecord], members: frozenset[int]) -> str:
        on_front = [record for record in records if record.number in members]
        heading = ["trial", *(one.name for one in self.objectives), "methods"]
        lines = [" | ".join(heading), " | ".join("---" for _ in heading)]
        for record in sorted(on_front, key=lambda one: one.evaluation.values[self.objectives[0].name]):
            values = [one.format(record.evaluation.values[one.name]) for one in self.objectives]
            methods = "+".join(record.evaluation.configuration.methods) or "head alone"
            lines.append(" | ".join([str(record.number), *values, methods]))
        title = f"**Pareto front: {len(on_front)} of {len(records)} trials**\n\n"
        return title + "\n".join(f"| {line} |" for line in lines)

    def finish(self, status: RunEnd, records: Sequence[TrialRecord] = ()) -> None:
        """Write what is waiting, log the table of all trials, and end the search's run."""
        if records:
            self._queue.put(partial(self._log_table, tuple(records)))
        self._queue.put(partial(self._client.set_terminated, self._parent, status=status))
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        if self.failures:
            _logger.warning(
                "%d entries could not be written to MLflow; the study has them all, and the next call of "
                "the search writes them.",
                self.failures,
            )

    def _log_table(self, records: Sequence[TrialRecord]) -> None:
        # log_table appends to a file that is there: a file a number of trials.
        frame = front_frame(records, self._members, self.objectives)
        self._client.log_table(self._parent, frame, f"pareto/trials_{len(records):05d}.json")

    def flush(self) -> None:
        """Wait until everything queued so far is written."""
        done = threading.Event()
        self._queue.put(done.set)
        done.wait()

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    entry()
                    break
                except Exception:
                    if attempt == _ATTEMPTS:
                        self.failures += 1
                        _logger.warning("An entry could not be written to MLflow.", exc_info=True)
                    else:  # SQLite is locked while another search writes
                        time.sleep(0.5 * attempt)


def _artifact_location(uri: str) -> str | None:
    """Return where artifacts of a local store go: beside the database, by absolute path.

    A server that is started in another folder then finds them too.
    """
    if uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        return None
    if not uri.startswith("sqlite:///"):
        raise ValueError(
            f"The tracking store {uri!r} is not one MLflow 3 can write: use a database such as "
            "'sqlite:///mlflow.db', or a server's address such as 'http://127.0.0.1:5000'."
        )
    path = Path(uri.removeprefix("sqlite:///")).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"The tracking store {uri!r} cannot be written in {path.parent}: {error.strerror}."
        ) from error
    return (path.parent / "mlartifacts").as_uri()
