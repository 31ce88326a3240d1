"""A trial written in one piece is the one that Optuna writes parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from autopeft.optimization.gathered_trial import GatheredTrial
from autopeft.optimization.samplers import make_sampler

FIXED = {"0.method": "lora", "0.rank": 2.0, "rate": 3e-3}


def suggest(trial: Trial) -> tuple[Any, ...]:
    """Ask for parameters of every kind, one of them twice and one that is not always there."""
    asked: list[Any] = []
    for index in range(4):
        method = trial.suggest_categorical(f"{index}.method", ("off", "lora", "series"))
        asked += method, trial.suggest_int(f"{index}.rank", 0, 6)
        if method == "lora":
            asked.append(trial.suggest_categorical(f"{index}.scaled", (True, False)))
    rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
    return (*asked, rate, trial.suggest_int("0.rank", 0, 6), trial.suggest_int("only", 3, 3))


def trials_of(sampler: str, wrap: Callable[[Trial], Trial]) -> tuple[list[Any], list[FrozenTrial]]:
    """Run a study of 30 trials, some of them with parameters that are fixed; return what was asked."""
    study: Study = optuna.create_study(directions=["maximize"], sampler=make_sampler(sampler, 7))
    asked = []
    for number in range(30):
        if number % 7 == 3:
            study.enqueue_trial(FIXED)
        trial = wrap(study.ask())
        asked.append((suggest(trial), trial.params, trial.distributions))
        if isinstance(trial, GatheredTrial):
            trial.write()
        trial.set_user_attr("number", number)
        study.tell(trial, trial.params["rate"] * (1 + trial.params["1.rank"]))
    return asked, study.get_trials()


def told(trial: FrozenTrial) -> tuple[Any, ...]:
    """Return everything of a trial but its times, the order and the types of its parameters included."""
    params = [(name, one, type(one)) for name, one in trial.params.items()]
    attributes = trial.user_attrs, trial.system_attrs
    return trial.number, trial.state, params, [*trial.distributions.items()], trial.values, attributes


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_trials_are_those_that_optuna_writes(sampler: str) -> None:
    asked, trials = trials_of(sampler, lambda trial: trial)
    gathered_asked, gathered = trials_of(sampler, GatheredTrial)
    assert gathered_asked == asked
    assert [*map(told, gathered)] == [*map(told, trials)]


def test_what_the_sampler_said_together_is_written_once() -> None:
    study = optuna.create_study(sampler=make_sampler("tpe", 7))
    for _ in range(15):
        trial = GatheredTrial(study.ask())
        value = trial.suggest_categorical("a", ("x", "y")) == "x", trial.suggest_int("b", 0, 5)
        trial.write()
        study.tell(trial, float(sum(value)))
    trial = GatheredTrial(study.ask())
    with patch.object(InMemoryStorage, "set_trial_param") as one_by_one:
        trial.suggest_categorical("a", ("x", "y"))
        trial.suggest_int("b", 0, 5)
        assert trial.params.keys() == {"a", "b"}
        stored = study.get_trials()[-1]
        assert (stored.params, stored.distributions) == ({}, {})
        trial.write()
    assert not one_by_one.called
    assert study.get_trials()[-1].params.keys() == {"a", "b"}


def test_a_fixed_value_out_of_range_is_taken_with_a_warning() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"rank": 9})
    trial = GatheredTrial(study.ask())
    with pytest.warns(UserWarning, match="out of range"):
        assert trial.suggest_int("rank", 0, 6) == 9


def test_another_kind_of_parameter_under_a_known_name_is_refused() -> None:
    study = optuna.create_study()
    study.enqueue_trial({"rank": 3})
    trial = GatheredTrial(study.ask())
    trial.suggest_int("rank", 0, 6)
    trial.write()
    study.tell(trial, 0.0)
    study.enqueue_trial({"new": 2, "rank": 3})
    other = GatheredTrial(study.ask())
    other.suggest_int("new", 0, 6)
    other.suggest_float("rank", 0, 6)
    with pytest.raises(ValueError, match="different distribution kind"):
        other.write()
    stored = study.get_trials()[-1]
    assert (stored.params, stored.distributions) == ({}, {})
    study.ask().suggest_float("new", 0, 6)  # the study has not heard of the other kind


def test_a_constant_is_not_asked_of_the_sampler() -> None:
    study = optuna.create_study(sampler=make_sampler("tpe", 7))
    study.enqueue_trial({"rank": 3})
    trial = GatheredTrial(study.ask())
    with patch.object(study.sampler, "sample_relative") as sample:
        assert (trial.suggest_int("rank", 0, 6), trial.suggest_int("only", 3, 3)) == (3, 3)
        trial.write()
    assert not sample.called
    assert study.get_trials()[-1].params == {"rank": 3, "only": 3}


def test_only_trials_of_a_storage_that_is_known_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study()
    with patch.object(study.sampler, "sample_relative") as sample:
        assert isinstance(GatheredTrial.of(study.ask()), GatheredTrial)
    assert not sample.called
    on_disk = optuna.create_study(storage=JournalStorage(JournalFileBackend(str(tmp_path / "journal"))))
    trial = on_disk.ask()
    assert GatheredTrial.of(trial) is trial
    monkeypatch.delattr(InMemoryStorage, "_set_trial")  # as in an Optuna that names it otherwise
    trial = study.ask()
    assert GatheredTrial.of(trial) is trial
