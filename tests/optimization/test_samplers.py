"""Samplers: each by name, on three objectives with constraints, and the same after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autopeft.optimization.proposal import Sampler
from autopeft.optimization.samplers import SAMPLERS, make_sampler, reads_study
from tests.slow_cases import slow_cases

NAMES = [name for name in SAMPLERS if name != "botorch"]


def new_study(trials: Sequence[FrozenTrial] = ()) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize", "minimize"])
    study.add_trials(trials)
    return study


def optuna_sampler(name: str, seed: int, number: int) -> BaseSampler:
    made = make_sampler(name, seed, number)
    assert isinstance(made, BaseSampler)
    return made


def ask(study: Study, name: str, seed: int = 0) -> Trial:
    """Ask for the next trial, of a sampler of its own."""
    study.sampler = optuna_sampler(name, seed, len(study.trials))
    return study.ask()


def step(study: Study, name: str, seed: int = 0) -> dict[str, Any]:
    """Ask and tell one trial as a search does: some are infeasible, some fail."""
    trial = ask(study, name, seed)
    size = trial.suggest_int("size", 1, 32)
    method = trial.suggest_categorical("method", ("lora", "prefix", "none"))
    rate = trial.suggest_float("rate", 1e-4, 1e-2, log=True)
    trial.set_constraint("size", (size - 24) / 24)
    if size > 24:
        study.tell(trial, state=TrialState.PRUNED)
    elif trial.number % 5 == 2:
        study.tell(trial, state=TrialState.FAIL)
    else:
        score = 1 - abs(size - 12) / 40 - (method == "none") * 0.2 - rate
        study.tell(trial, [score, float(size), size * (1 + (method == "lora"))])
    return trial.params


def asked(name: str, count: int, seed: int = 0) -> Study:
    study = new_study()
    for _ in range(count):
        step(study, name, seed)
    return study


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_takes_three_objectives_with_constraints(name: str) -> None:
    trials = asked(name, 20 if name != "gp" else 14).trials
    assert len({str(trial.params) for trial in trials}) > 7
    assert {trial.state for trial in trials} >= {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    first, again, other = (asked(name, 4, seed) for seed in (0, 0, 1))
    assert [trial.params for trial in first.trials] == [trial.params for trial in again.trials]
    assert [trial.params for trial in first.trials] != [trial.params for trial in other.trials]


@pytest.mark.parametrize(
    ("name", "length", "stops"),
    [
        ("random", 12, (1, 5, 11)),
        ("tpe", 24, (1, 9, 10, 12, 17, 23)),
        ("nsga2", 70, (5, 31, 57, 68)),
        ("nsga3", 70, (5, 31, 57, 68)),
        ("gp", 14, (3, 10, 13)),
    ],
)
def test_what_is_asked_follows_from_the_trials_before(name: str, length: int, stops: tuple[int, ...]) -> None:
    """Each trial is asked of a study that is derived anew, as in a search."""
    trials = list[FrozenTrial]()
    for number in range(length):
        study, again = new_study(trials), new_study(trials)
        found = step(study, name)
        assert number not in stops or step(again, name) == found, f"trial {number}"
        trials = study.get_trials()


@pytest.mark.parametrize("name", ["nsga2", *slow_cases("nsga3")])
def test_genetic_samplers_go_on_with_the_generations_of_the_trials_they_are_shown(name: str) -> None:
    study, sizes = new_study(), list[int]()
    for _ in range(100):
        study = new_study(study.get_trials())
        trial = ask(study, name)
        sizes.append(sum(trial.suggest_int(f"{index}.size", 0, 100) for index in range(8)))
        study.tell(trial, [-sizes[-1], sizes[-1], sizes[-1]])  # the smallest is best in all objectives
    assert sum(sizes[-20:]) < sum(sizes[:20]) * 2 / 3


def test_an_enqueued_trial_is_asked_first() -> None:
    study = new_study()
    wanted = {"size": 3, "method": "prefix", "rate": 1e-3}
    study.enqueue_trial(wanted)
    assert step(study, "tpe") == wanted


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown sampler 'nsga-2'.*did you mean 'nsga2'"):
        make_sampler("nsga-2", 0)


def test_an_optuna_sampler_is_used_as_it_is() -> None:
    sampler = optuna.samplers.RandomSampler(seed=3)
    assert make_sampler(sampler, 0) is sampler


def test_named_samplers_are_seeded_by_trial() -> None:
    rates = [optuna_sampler("random", seed, number) for seed, number in ((0, 1), (0, 1), (0, 2), (1, 1))]
    drawn = []
    for sampler in rates:
        study = new_study()
        study.sampler = sampler
        drawn.append(study.ask().suggest_float("rate", 0, 1))
    assert drawn[0] == drawn[1]
    assert len({*drawn}) == 3


def test_botorch_works_or_says_what_is_missing() -> None:
    try:
        make_sampler("botorch", 0)
    except ValueError as error:
        assert "autopeft[botorch]" in str(error)  # noqa: PT017
    else:
        asked("botorch", 12)


def test_which_samplers_read_the_study() -> None:
    class Own(optuna.samplers.RandomSampler):
        """Might read trials."""

    reading: list[str | Sampler] = [
        *({*SAMPLERS} - {"random"}),
        "one by an entry point",
        optuna.samplers.TPESampler(),
        Own(),
    ]
    assert all(map(reads_study, reading))
    not_reading: list[str | Sampler] = ["ehvi", "random", make_sampler("ehvi", 0), make_sampler("random", 0)]
    assert not any(map(reads_study, not_reading))
