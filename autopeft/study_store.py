"""A search's study on disk: one writer, nothing lost by kill -9, fast with many parameters.

The live study is in memory, which is where samplers read it. A finished trial goes to an Optuna journal
file in one write (a suggested parameter at a time would be one write each: 0.2 s for 48 of them), so the
file is a plain Optuna study that optuna-dashboard opens. A paused trial is a running one there; the live
study has it as complete, with the values it is expected to reach.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.evaluation import TrialRecord
from autopeft.fidelity import Promotion
from autopeft.journal import SoleWriterJournal
from autopeft.objectives import Objective
from autopeft.profiling import section

STUDY_FILE = "study.log"
_RECORD = "autopeft:record"
_IDENTITY = "autopeft:identity"


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
        promotion: Promotion | None = None,
    ) -> None:
        self.folder = folder
        self._lock = _lock(folder, name)
        self._journal: SoleWriterJournal | None = None
        self._sampler = sampler
        self._promotion = promotion
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
        self.records += [record_of(trial) for trial in self._saved.get_trials(deepcopy=False)]
        self._refresh(())

    def _refresh(self, waiting: Sequence[FrozenTrial]) -> None:
        """Make the live study anew: what paused trials are expected to reach has changed."""
        saved = self._saved
        with quiet_optuna():
            self.live = optuna.create_study(
                study_name=saved.study_name, directions=saved.directions, sampler=self._sampler
            )
            self.live.set_metric_names(saved.metric_names or [])
        forecast = None if self._promotion is None else self._promotion.forecast(self.records)
        for trial, record in zip(saved.get_trials(deepcopy=False), self.records, strict=True):
            if record.evaluation.status == "paused":
                assert forecast is not None
                trial = _finished(trial, forecast.values(record.evaluation))
            self.live.add_trial(trial)
        for trial in waiting:
            self.live.add_trial(trial)

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

    @section("record")
    def save(self, record: TrialRecord, trial: FrozenTrial) -> None:
        """Write a finished or paused trial; after this it survives anything."""
        trial.user_attrs[_RECORD] = _encode(record)
        if record.evaluation.status == "paused":
            trial = copy.copy(trial)
            trial.state, trial.datetime_complete = TrialState.RUNNING, None
            trial.values = None
        self._saved.add_trial(trial)
        self.records.append(record)

    @section("record")
    def update(self, record: TrialRecord, state: TrialState, values: Sequence[float] | None) -> None:
        """Write what became of a paused trial that went on.

        Args:
            record: The trial now.
            state: RUNNING where it has paused again.
            values: The objectives of a complete trial.
        """
        index = next(place for place, one in enumerate(self.records) if one.number == record.number)
        storage = self._saved._storage
        trial_id = self._saved.get_trials(deepcopy=False)[index]._trial_id
        storage.set_trial_user_attr(trial_id, _RECORD, _encode(record))
        if state is not TrialState.RUNNING:
            storage.set_trial_state_values(trial_id, state, values)
        self.records[index] = record
        self._refresh(self.live.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

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


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Return the record of a saved trial."""
    return TrialRecord.from_dict(json.loads(trial.user_attrs[_RECORD]))


def _finished(trial: FrozenTrial, values: Sequence[float]) -> FrozenTrial:
    """Return a paused trial as samplers are to see it: complete, with what it is expected to reach."""
    trial = copy.copy(trial)
    trial.state, trial.datetime_complete = TrialState.COMPLETE, trial.datetime_start
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
    attributes = {key.removeprefix("autopeft:"): one for key, one in study.user_attrs.items()}
    records = [record_of(trial) for trial in study.get_trials(deepcopy=False)]
    return {"name": names[0], **attributes}, records


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
