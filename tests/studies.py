"""Studies on disk, with made-up trials."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial

from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.study_store import STUDY_FILE, StudyStore
from tests.records import METRICS, OBJECTIVES, completed, random_configuration

TWO = resolve_objectives(("accuracy", "trainable_parameters"), METRICS)
RANKS: dict[str, BaseDistribution] = {"rank": IntDistribution(1, 64)}
ROOT = Path(__file__).parents[2]


def opened(folder: Path, objectives: Sequence[Objective] = OBJECTIVES, name: str = "questions") -> StudyStore:
    return StudyStore(folder, name, objectives)


def made_up(number: int, *, fails: bool = False) -> TrialRecord:
    draw = random.Random(number)
    configuration = random_configuration(draw)
    if fails:
        failed = Evaluation(configuration=configuration, status="failed", reason="diverged: loss is nan")
        return TrialRecord(number=number, evaluation=failed)
    return completed(number, configuration, draw, baseline="head only" if number % 2 else None)


def proposed(record: TrialRecord, rank: int, attributes: Mapping[str, Any] | None = None) -> Proposal:
    """Return what was proposed for a made-up trial."""
    return Proposal(
        configuration=record.evaluation.configuration,
        params={"rank": rank},
        distributions=RANKS,
        system_attrs=attributes or {},
    )


def told(store: StudyStore, number: int, *, fails: bool = False) -> TrialRecord:
    """Tell a made-up trial."""
    record = made_up(number, fails=fails)
    assert store.tell(record, proposed(record, 1 + number)) == [record]
    return record


def filled(folder: Path, count: int = 4) -> list[TrialRecord]:
    store = opened(folder)
    store.check_identity({"search": {"seed": "0"}})
    records = [told(store, number, fails=number == 1) for number in range(count)]
    store.close()
    return records


def paused(record: TrialRecord) -> TrialRecord:
    evaluation = replace(record.evaluation, status="paused", reason="half of it", fidelity=0.5)
    return replace(record, evaluation=evaluation)


def values_of(record: TrialRecord) -> list[float]:
    return [record.evaluation.values[objective.name] for objective in OBJECTIVES]


def optunas(folder: Path) -> Study:
    """Open the file as any user of Optuna does."""
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
    return optuna.load_study(study_name=None, storage=storage)


def saved(folder: Path, number: int) -> FrozenTrial:
    """Return a trial as Optuna sees it, by the record's number."""
    trials = optunas(folder).trials
    return next(
        trial for trial in trials if json.loads(trial.user_attrs["autopeft:record"])["number"] == number
    )


def opened_records(folder: Path) -> Sequence[TrialRecord]:
    store = opened(folder)
    store.close()
    return store.records
