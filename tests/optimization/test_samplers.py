"""Samplers: each by name, on three objectives with constraints, and the same after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from autopeft.optimization.samplers import SAMPLERS, SeededSampler, make_sampler

NAMES = [name for name in SAMPLERS if name != "botorch"]


def new_study(sampler: BaseSampler) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["maximize", "minimize", "minimize"], sampler=sampler)


def step(study: Study) -> dict[str, Any]:
    """Ask and tell one trial as a search does: some are infeasible, some fail."""
    trial: Trial = study.ask()
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
    study = new_study(make_sampler(name, seed))
    for _ in range(count):
        step(study)
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


def study_of(sampler: BaseSampler, trials: Sequence[FrozenTrial]) -> Study:
    study = new_study(sampler)
    study.add_trials(trials)
    return study


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
def test_a_new_sampler_asks_what_one_that_saw_the_whole_search_asks(
    name: str, length: int, stops: tuple[int, ...]
) -> None:
    """Each trial is asked of a study that is derived anew, as in a search."""
    sampler, trials = make_sampler(name, 0), list[FrozenTrial]()
    for number in range(length):
        study = study_of(sampler, trials)
        if number in stops:
            again = study_of(make_sampler(name, 0), trials)
            assert step(again) == step(study), f"trial {number}"
        else:
            step(study)
        trials = study.get_trials()


@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_trial_does_not_change_the_next(name: str) -> None:
    """What Ctrl-C leaves in a study is gone with it; the sampler must not remember it either."""
    sampler = make_sampler(name, 0)
    whole = asked(name, 6)
    study_of(sampler, whole.trials[:4]).ask().suggest_int("size", 1, 32)
    again = study_of(sampler, whole.trials[:4])
    assert [step(again), step(again)] == [trial.params for trial in whole.trials[4:]]


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_genetic_samplers_go_on_with_the_generations_of_the_trials_they_are_shown(name: str) -> None:
    trials, sizes = list[FrozenTrial](), list[int]()
    for _ in range(100):
        study = study_of(make_sampler(name, 0), trials)
        trial = study.ask()
        sizes.append(sum(trial.suggest_int(f"{index}.size", 0, 100) for index in range(8)))
        study.tell(trial, [-sizes[-1], sizes[-1], sizes[-1]])  # the smallest is best in all objectives
        trials = study.get_trials()
    assert sum(sizes[-20:]) < sum(sizes[:20]) * 2 / 3


def test_an_enqueued_trial_is_asked_first() -> None:
    study = new_study(make_sampler("tpe", 0))
    wanted = {"size": 3, "method": "prefix", "rate": 1e-3}
    study.enqueue_trial(wanted)
    assert step(study) == wanted


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown sampler 'nsga-2'.*did you mean 'nsga2'"):
        make_sampler("nsga-2", 0)


def test_an_optuna_sampler_is_used_as_it_is() -> None:
    sampler = optuna.samplers.RandomSampler(seed=3)
    assert make_sampler(sampler, 0) is sampler


def test_named_samplers_are_seeded_by_trial() -> None:
    assert all(isinstance(make_sampler(name, 0), SeededSampler) for name in NAMES)


def test_botorch_works_or_says_what_is_missing() -> None:
    try:
        sampler = make_sampler("botorch", 0)
    except ValueError as error:
        assert "autopeft[botorch]" in str(error)  # noqa: PT017
    else:
        study = new_study(sampler)
        for _ in range(12):
            step(study)
