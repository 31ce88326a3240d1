"""A trial written in one piece is the one that Optuna writes parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from autopeft.gathered_trial import GatheredTrial
from autopeft.samplers import make_sampler

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
    study.enqueue_trial({"rank": 3})
    other = GatheredTrial(study.ask())
    other.suggest_float("rank", 0, 6)
    with pytest.raises(ValueError, match="different distribution kind"):
        other.write()
