"""A search's study on disk: one writer, nothing lost by kill -9, fast with many parameters.

The live study is in memory, which is where samplers read it. A finished trial goes to an Optuna journal
file in one write (a suggested parameter at a time would be one write each: 0.2 s for 48 of them), so the
file is a plain Optuna study that optuna-dashboard opens. A paused trial is a running one there; the live
study has it as complete, with the values it is expected to reach. A trial that was trained again has the
values of its first training in the file, as Optuna changes no finished trial, and its means in the study's
attributes; the live study has the means.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.evaluation import Status, TrialRecord
from autopeft.core.objectives import Objective
from autopeft.core.profiling import section
from autopeft.optimization.changed_trial import change_trial
from autopeft.optimization.journal import SoleWriterJournal
from autopeft.optimization.learning_curve_forecast import Forecast
from autopeft.optimization.successive_halving import AshaPromoter

STUDY_FILE = "study.log"
_RECORD = "autopeft:record"
_IDENTITY = "autopeft:identity"
_METRIC_NAMES = "study:metric_names"  # Optuna's name for it
STATES: Mapping[Status, TrialState] = {
    "complete": TrialState.COMPLETE,
    "paused": TrialState.RUNNING,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""What a trial of each status is in the file."""


class StudyStore:
    """The study of one search in a folder, held by one process at a time.

    Args:
        folder: Made if it is not there.
        name: Name of the study.
        objectives: Give the study its directions.
        sampler: Asks from the live study.
        promotion: Says what paused trials are expected to reach; None where trials do not pause.

    Raises:
        ValueError: The folder cannot be written, another process runs this search, or the folder holds
            one with other objectives.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        objectives: Sequence[Objective],
        sampler: BaseSampler,
        promotion: AshaPromoter | None = None,
    ) -> None:
        self.folder = folder
        self._lock = _lock(folder, name)
        self._journal: SoleWriterJournal | None = None
        self._sampler = sampler
        self.promotion = promotion
        self.records: list[TrialRecord] = []
        self.live: Study
        try:
            self._open(name, objectives)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str, objectives: Sequence[Objective]) -> None:
        self._journal = SoleWriterJournal(self.folder / STUDY_FILE)
        storage = JournalStorage(self._journal)
        directions = [objective.direction for objective in objectives]
        names = [objective.name for objective in objectives]
        with quiet_optuna():
            self._saved = optuna.create_study(
                study_name=name, storage=storage, directions=directions, load_if_exists=True
            )
            known = self._saved.metric_names
            if known is not None and known != names:
                raise self._other_search([f"objectives: {', '.join(known)} there, {', '.join(names)} here"])
            self._saved.set_metric_names(names)
        self.records += _records(self._saved)
        originals = (one.evaluation for one in self.records if one.duplicate_of is None)
        if self.promotion is None and any(one.status == "paused" for one in originals):
            raise self._other_search(["fidelity: trials pause there, none does here"])
        for trial, record in zip(self._saved.get_trials(deepcopy=False), self.records, strict=True):
            self._finish(trial, record)  # a process that was killed may not have come to it
        self._end_duplicates()  # nor to this
        self._refresh(())

    def _refresh(self, waiting: Sequence[FrozenTrial]) -> None:
        """Make the live study anew."""
        saved = self._saved
        with quiet_optuna():
            self.live = optuna.create_study(
                study_name=saved.study_name, directions=saved.directions, sampler=self._sampler
            )
            self.live.set_metric_names(saved.metric_names or [])
        forecast = self._forecast()
        for trial, record in zip(saved.get_trials(deepcopy=False), self.records, strict=True):
            values = self._expected(record, forecast)
            self.live.add_trial(trial if values is None else _finished(trial, values))
        for trial in waiting:
            self.live.add_trial(trial)

    def _forecast(self) -> Forecast | None:
        return None if self.promotion is None else self.promotion.forecast(self.records)

    def _expected(self, record: TrialRecord, forecast: Forecast | None) -> list[float] | None:
        """Return the objectives that samplers are to see; None where there are none.

        Of a paused trial those it is expected to reach, of one that was trained again its means; a duplicate
        has what its original has.
        """
        evaluation = record.evaluation
        if record.duplicate_of is not None:
            evaluation = next(one.evaluation for one in self.records if one.number == record.duplicate_of)
        if evaluation.status == "paused":
            assert forecast is not None  # else the search was refused
            return forecast.values(evaluation)
        return self._objectives(evaluation.values) if evaluation.status == "complete" else None

    def _objectives(self, values: Mapping[str, float]) -> list[float]:
        return [values[name] for name in self._saved.metric_names or ()]

    def _follow(self, changed: int) -> None:
        """Bring the live study up to date with a trial that changed, and what paused ones now promise."""
        live = self.live.get_trials(deepcopy=False)
        saved = self._saved.get_trials(deepcopy=False)
        forecast = self._forecast()
        # Genetic samplers keep the parents of a generation there, chosen by values that may change now.
        is_known = not self.live._storage.get_study_system_attrs(self.live._study_id).keys() - {_METRIC_NAMES}
        for place, record in enumerate(self.records):
            if record.evaluation.status != "paused" and changed not in (record.number, record.duplicate_of):
                continue
            values = self._expected(record, forecast)
            state = saved[place].state if values is None else TrialState.COMPLETE
            if (live[place].state, live[place].values) == (state, values):
                continue
            if not (is_known and change_trial(self.live, place, state, values)):
                self._refresh(self.live.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
                return

    def _other_search(self, differing: Sequence[str]) -> ValueError:
        return ValueError(
            f"The search {self._saved.study_name!r} in {self.folder} has other settings "
            f"({'; '.join(differing)}). Give this one another name, or the same settings."
        )

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Remember what this search is; on resuming, raise where it is another one.

        Raises:
            ValueError: The folder holds a search with other settings; the message says which differ.
        """
        known = self._saved.user_attrs.get(_IDENTITY)
        new = json.loads(json.dumps(dict(identity)))
        if known is None:
            self._saved.set_user_attr(_IDENTITY, new)
            return
        differing = _differences(known, new)
        if differing:
            raise self._other_search(differing)

    def set_attribute(self, name: str, value: Any) -> None:
        """Keep a JSON value with the study."""
        self._saved.set_user_attr(f"autopeft:{name}", value)

    @property
    def study_id(self) -> str:
        """A random id that tells this study from others with the same name and settings."""
        if "autopeft:study_id" not in self._saved.user_attrs:
            self.set_attribute("study_id", uuid.uuid4().hex)
        return str(self._saved.user_attrs["autopeft:study_id"])

    @section("record")
    def save(self, records: Sequence[TrialRecord]) -> None:
        """Write finished or paused trials of the live study; after this they survive anything.

        All that run in the live study have to be among them: it may be made anew.
        """
        live = self.live.get_trials(deepcopy=False)
        assert self._journal is not None
        with self._journal.in_one_piece() if len(records) > 1 else nullcontext():
            for record in records:
                trial = live[record.number]
                trial.user_attrs[_RECORD] = _encode(record)
                if record.evaluation.status == "paused":
                    trial = copy.copy(trial)
                    trial.state, trial.datetime_complete = TrialState.RUNNING, None
                    trial.values = None
                self._saved.add_trial(trial)
        self.records += records
        complete = [one.number for one in records if one.evaluation.status == "complete"]
        if complete and self.promotion is not None:
            self._follow(complete[-1])  # whole trainings tell of those that paused

    @section("record")
    def update(self, record: TrialRecord) -> list[TrialRecord]:
        """Write what became of a paused trial that went on, or of a complete one that was trained again.

        Returns:
            The trial, and its duplicates that paused with it, which became the same.
        """
        self._write(record)
        duplicates = self._end_duplicates()
        self._follow(record.number)
        return [record, *duplicates]

    def _end_duplicates(self) -> list[TrialRecord]:
        """Give those that paused with a trial that is over its outcome, and return them."""
        known = {one.number: one.evaluation for one in self.records}
        found = [
            replace(one, evaluation=known[one.duplicate_of])
            for one in self.records
            if one.duplicate_of is not None
            and one.evaluation.status == "paused" != known[one.duplicate_of].status
        ]
        for one in found:
            self._write(one)
        return found

    def _write(self, record: TrialRecord) -> None:
        index = next(place for place, one in enumerate(self.records) if one.number == record.number)
        trial = self._saved.get_trials(deepcopy=False)[index]
        if trial.state.is_finished():
            self._saved.set_user_attr(f"{_RECORD}:{record.number}", _encode(record))
        else:
            self._saved._storage.set_trial_user_attr(trial._trial_id, _RECORD, _encode(record))
        self.records[index] = record
        self._finish(trial, record)

    def _finish(self, trial: FrozenTrial, record: TrialRecord) -> None:
        """Finish a trial of the file that is over, with the values of its first training."""
        evaluation = record.evaluation
        if trial.state.is_finished() or evaluation.status == "paused":
            return
        is_complete = evaluation.status == "complete"
        first = next(iter(evaluation.each_training().values()))
        values = self._objectives(first) if is_complete else None
        self._saved._storage.set_trial_state_values(trial._trial_id, STATES[evaluation.status], values)

    def close(self) -> None:
        """Let another process run this search."""
        try:
            if self._journal is not None:
                self._journal.close()
        finally:
            self._lock.close()


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence messages of studies created; warnings stay, metric names being experimental apart."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _differences(known: Any, new: Any, path: str = "") -> list[str]:
    """Return the settings that differ, each by its full name, with both values."""
    if isinstance(known, Mapping) and isinstance(new, Mapping):
        return [
            difference
            for key in sorted(known.keys() | new.keys())
            for difference in _differences(known.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if known == new else [f"{path}: {known!r} there, {new!r} here"]


def _encode(record: TrialRecord) -> str:
    # Optuna holds every attribute of every trial: as dictionaries a record takes 400 KiB, as text 10.
    return json.dumps(record.to_dict())


def _records(study: Study) -> list[TrialRecord]:
    """Return the records of a saved study, of trials that were trained again the latest."""
    latest = study.user_attrs
    texts = (
        latest.get(f"{_RECORD}:{trial.number}", trial.user_attrs[_RECORD])
        for trial in study.get_trials(deepcopy=False)
    )
    return [TrialRecord.from_dict(json.loads(text)) for text in texts]


def _finished(trial: FrozenTrial, values: Sequence[float]) -> FrozenTrial:
    """Return a trial as samplers are to see it: complete, with what it is expected to reach, or its means."""
    trial = copy.copy(trial)
    trial.state = TrialState.COMPLETE
    trial.datetime_complete = trial.datetime_complete or trial.datetime_start
    trial.values = values
    return trial


def load_study(folder: Path) -> tuple[Mapping[str, Any], list[TrialRecord]]:
    """Read a search's attributes and finished trials without holding it (it may be running).

    Raises:
        ValueError: There is no search in the folder.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        raise ValueError(f"There is no search in {folder}: expected the file {STUDY_FILE} in it.")
    storage = JournalStorage(JournalFileBackend(str(path)))
    names = optuna.get_all_study_names(storage)
    if not names:
        raise ValueError(f"There is no search in {folder}: {STUDY_FILE} is empty.")
    study = optuna.load_study(study_name=names[0], storage=storage)
    attributes = {
        key.removeprefix("autopeft:"): one
        for key, one in study.user_attrs.items()
        if not key.startswith(f"{_RECORD}:")
    }
    return {"name": names[0], **attributes}, _records(study)


def _lock(folder: Path, name: str) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("a+")
    except OSError as error:
        raise ValueError(
            f"The search cannot be kept in {folder}: {error.strerror}. "
            "Pass folder=... with a folder that can be written."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.seek(0)
        owner = handle.read().strip() or "unknown"
        handle.close()
        raise ValueError(
            f"The search {name!r} is being run by process {owner}: wait for it, stop it, or give "
            "this one another name or seed."
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle
