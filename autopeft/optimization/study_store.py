"""A search's study on disk: one writer, nothing lost by kill -9, and any Optuna tool opens it.

The records are the truth, each kept with its trial in an Optuna journal. Trials may finish in any order: a
record has its own number, and Optuna's is the trial's place in the file. A paused trial is a running one
there. A trial that was trained again has the values of its first training there, as Optuna changes no
finished trial, and its record in the study's attributes. Samplers read a study in memory, derived from these.
"""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from autopeft.core.evaluation import Evaluation, Status, TrialRecord
from autopeft.core.objectives import Constraint, Direction, Objective
from autopeft.core.profiling import section
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.study_file import damage_named, lock_folder, open_journal, read_journal
from autopeft.optimization.trial_records import TrialRecords

STUDY_FILE = "study.log"
SETTINGS_FILE = "search.yaml"
_PREFIX = "autopeft:"
_RECORD = f"{_PREFIX}record"
_IDENTITY = f"{_PREFIX}identity"
_STUDY_ID = f"{_PREFIX}study_id"
_number = attrgetter("number")
STATES: Mapping[Status, TrialState] = {
    "complete": TrialState.COMPLETE,
    "paused": TrialState.RUNNING,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
"""Optuna's state of a trial of each status."""


class StudyStore:
    """The study of one search in a folder, held by one process at a time.

    Without `keeps_parameters` those of Optuna are in the file alone, and no sampler can be shown a view.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        keeps_parameters: bool = True,
    ) -> None:
        self.folder = folder
        self._name = name
        self._objectives = tuple(objectives)
        self._constraints = tuple(constraints)
        self._keeps_parameters = keeps_parameters
        self._lock = lock_folder(folder, name)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._storage = open_journal(self.folder / STUDY_FILE, keeps_parameters=self._keeps_parameters)
        names = [objective.name for objective in self._objectives]
        known = [study.study_name for study in self._storage.get_all_studies()]
        if known and self._name not in known:
            raise self._other_search([f"name: {known[0]!r} there, {self._name!r} here"])
        with quiet_optuna():
            if known:
                study = optuna.load_study(study_name=self._name, storage=self._storage)
            else:
                study = optuna.create_study(
                    study_name=self._name, storage=self._storage, directions=self._directions
                )
            there = study.metric_names or []
            if there and there != names:
                raise self._other_search([f"objectives: {', '.join(there)} there, {', '.join(names)} here"])
            if not there:
                study.set_metric_names(names)
        self._study = self._storage.get_study_id_from_name(self._name)
        if _STUDY_ID not in self._attributes():
            self._storage.set_study_user_attr(self._study, _STUDY_ID, uuid.uuid4().hex)
        self.study_id: str = self._attributes()[_STUDY_ID]
        with damage_named(self.folder / STUDY_FILE):
            found = _records_of(self._storage, self._study)
        self._places = {record.number: place for place, record in enumerate(found)}  # Optuna's numbers
        self._records = TrialRecords(self._objectives, found)
        self._finish(self._records)  # what a killed process did not get to
        self._end_duplicates()

    @property
    def records(self) -> TrialRecords:
        """Every finished and paused trial, by number."""
        return self._records

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Remember what this search is; on resuming, raise where it is another one."""
        new = json.loads(json.dumps(dict(identity)))
        if differing := _differences(self._attributes().get(_IDENTITY, new), new):
            raise self._other_search(differing)
        self.set_attribute("identity", new)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return a value that was kept with the study."""
        return self._attributes().get(f"{_PREFIX}{name}", default)

    def set_attribute(self, name: str, value: Any) -> None:
        """Keep a JSON value with the study."""
        if self.attribute(name) != value:
            self._storage.set_study_user_attr(self._study, f"{_PREFIX}{name}", value)

    @section("record")
    def tell(self, record: TrialRecord, proposal: Proposal | None = None) -> list[TrialRecord]:
        """Write a finished or paused trial, or what became of one; after this it survives anything.

        A record with a known number takes the place of what was known of the trial; a new trial comes with
        what was proposed.

        Returns:
            The trial, and its duplicates that were paused with it and have now the same outcome.
        """
        if proposal is None:
            self._update(record)
            return [record, *self._end_duplicates()]
        evaluation = record.evaluation
        trial = create_trial(
            state=STATES[evaluation.status],
            values=self._first_values(evaluation),
            user_attrs={_RECORD: _encode(record)},
            constraints=self._violations(evaluation),
            **_suggested(proposal),
        )
        trial_id = self._storage.create_new_trial(self._study, trial)
        self._places[record.number] = self._storage.get_trial_number_from_id(trial_id)
        self._records.put(record)
        return [record]

    def _update(self, record: TrialRecord) -> None:
        if self._saved()[self._places[record.number]].state.is_finished():
            self._storage.set_study_user_attr(self._study, f"{_RECORD}:{record.number}", _encode(record))
        else:
            self._storage.set_trial_user_attr(self._trial_id(record), _RECORD, _encode(record))
            self._finish([record])
        self._records.put(record)

    def _finish(self, records: Sequence[TrialRecord]) -> None:
        """Finish trials of the file that are over."""
        saved = self._saved()
        for record in records:
            status = record.evaluation.status
            if status != "paused" and not saved[self._places[record.number]].state.is_finished():
                values = self._first_values(record.evaluation)
                self._storage.set_trial_state_values(self._trial_id(record), STATES[status], values)

    def _end_duplicates(self) -> list[TrialRecord]:
        """Give duplicates that are paused the outcome of their originals that are not, and return them."""
        outcome = self._outcomes()
        ended = [
            replace(record, evaluation=outcome[record.number])
            for record in self._records
            if record.evaluation.status == "paused" != outcome[record.number].status
        ]
        for record in ended:
            self._update(record)
        return ended

    def _outcomes(self) -> dict[int, Evaluation]:
        """Return the evaluation of every trial by number; of a duplicate its original's."""
        known = {record.number: record.evaluation for record in self._records}
        for record in self._records:
            if record.duplicate_of is not None:
                known[record.number] = known.get(record.duplicate_of, record.evaluation)
        return known

    def view(
        self,
        *,
        expected: Callable[[Evaluation], Sequence[float]] | None = None,
        running: Iterable[Proposal] = (),
    ) -> Study:
        """Return a study in memory for samplers to read; it is derived from the records and kept nowhere.

        A trial that was trained several times has its means, a duplicate what its original has. A paused
        trial is a running one, or has the objectives that `expected` gives for it.
        """
        assert self._keeps_parameters, "trials without their parameters would mislead a sampler"
        saved, trials = self._saved(), []
        for number, evaluation in self._outcomes().items():
            trial, values = saved[self._places[number]], None
            if evaluation.status == "complete":
                values = self._values(evaluation.values_at_end)
            elif evaluation.status == "paused" and expected is not None:
                values = list(expected(evaluation))
            state = STATES[evaluation.status] if values is None else TrialState.COMPLETE
            trials.append(create_trial(state=state, values=values, **_suggested(trial)))
        trials += [create_trial(state=TrialState.RUNNING, **_suggested(proposal)) for proposal in running]
        with quiet_optuna():
            study = optuna.create_study(directions=self._directions)
        study.add_trials(trials)
        return study

    def close(self) -> None:
        """Let another process run this search."""
        self._lock.close()

    @property
    def _directions(self) -> list[Direction]:
        return [objective.direction for objective in self._objectives]

    def _attributes(self) -> Mapping[str, Any]:
        return self._storage.get_study_user_attrs(self._study)

    def _saved(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study, deepcopy=False)

    def _trial_id(self, record: TrialRecord) -> int:
        place = self._places[record.number]
        return self._storage.get_trial_id_from_study_id_trial_number(self._study, place)

    def _values(self, values: Mapping[str, float]) -> list[float]:
        return [values[objective.name] for objective in self._objectives]

    def _first_values(self, evaluation: Evaluation) -> list[float] | None:
        """Return the objectives of the first training; None where it was not completed."""
        if evaluation.status != "complete":
            return None
        return self._values(next(iter(evaluation.each_training().values())))

    def _violations(self, evaluation: Evaluation) -> dict[str, float]:
        """Return the constraints' violations; what is not known yet violates nothing."""
        known = evaluation.values
        named = ((constraint.objective.name, constraint) for constraint in self._constraints)
        return {name: constraint.violation(known) if name in known else 0.0 for name, constraint in named}

    def _other_search(self, differing: Sequence[str]) -> ValueError:
        return ValueError(
            f"The search {self._name!r} in {self.folder} has other settings "
            f"({'; '.join(differing)}). Give this one another name, or the same settings."
        )


def load_study(folder: Path) -> tuple[Mapping[str, Any], list[TrialRecord]]:
    """Read a search's attributes and its trials by number, without holding it (it may be running)."""
    path = folder / STUDY_FILE
    if not path.is_file():
        raise ValueError(f"There is no search in {folder}: expected the file {STUDY_FILE} in it.")
    storage = read_journal(path)
    studies = storage.get_all_studies()
    if not studies:
        raise ValueError(f"There is no search in {folder}: {STUDY_FILE} is empty.")
    name = studies[0].study_name
    with damage_named(path):
        attributes = {
            key.removeprefix(_PREFIX): value
            for key, value in studies[0].user_attrs.items()
            if not key.startswith(f"{_RECORD}:")
        }
        records = _records_of(storage, storage.get_study_id_from_name(name))
    return {"name": name, **attributes}, sorted(records, key=_number)


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


def _suggested(trial: Proposal | FrozenTrial) -> dict[str, Any]:
    """Return what was suggested for a trial, as `create_trial` takes it."""
    return {
        "params": dict(trial.params),
        "distributions": dict(trial.distributions),
        "system_attrs": dict(trial.system_attrs),
    }


def _encode(record: TrialRecord) -> str:
    # Optuna holds every attribute of every trial: as dictionaries a record takes 400 KiB, as text 10.
    return json.dumps(record.to_dict())


def _records_of(storage: JournalStorage, study: int) -> list[TrialRecord]:
    """Return the records in the order of the file; of trials that were trained again, the latest."""
    latest = storage.get_study_user_attrs(study)
    found = []
    for trial in storage.get_all_trials(study, deepcopy=False):
        record = TrialRecord.from_dict(json.loads(trial.user_attrs[_RECORD]))
        updated = latest.get(f"{_RECORD}:{record.number}")
        found.append(record if updated is None else TrialRecord.from_dict(json.loads(updated)))
    return found
