"""Samplers: each by name, on three objectives with constraints, and the same after a restart."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna._hypervolume.hssp import _solve_hssp
from optuna.samplers import BaseSampler
from optuna.samplers._tpe.sampler import _get_reference_point
from optuna.study import Study
from optuna.study._multi_objective import _is_pareto_front
from optuna.trial import Trial, TrialState

from autopeft.optimization.remembering_tpe import most_hypervolume
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


class PlainTPE(SeededSampler):
    """Optuna's own TPE, seeded a trial as ours is."""

    def __init__(self, seed: int) -> None:
        super().__init__(
            lambda one: optuna.samplers.TPESampler(seed=one, multivariate=True, n_startup_trials=10), seed
        )


def test_tpe_asks_what_optunas_asks() -> None:
    ours, plain = asked("tpe", 120), new_study(PlainTPE(0))
    for _ in range(120):
        step(plain)
    assert [one.params for one in ours.trials] == [one.params for one in plain.trials]


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_a_rank_are_those_of_most_hypervolume(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses = (
        generator.random((int(generator.integers(30, 300)), 2 + seed % 2)) * [-1.0, 1e5, 1e8][: 2 + seed % 2]
    )
    losses = losses[_is_pareto_front(losses, assume_unique_lexsorted=False)]
    count = len(losses) // 2
    expected = _solve_hssp(losses, np.arange(len(losses)), count, _get_reference_point(losses))
    assert most_hypervolume(losses, count).tolist() == expected.tolist()
    assert most_hypervolume(losses, len(losses)).tolist() == list(range(len(losses)))


def test_the_best_of_a_rank_may_be_alike() -> None:
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert sorted(most_hypervolume(losses, 2).tolist()) == [0, 1]


def test_tpe_asks_what_optunas_asks_for_one_objective_and_parameters_that_not_all_trials_have() -> None:
    asked: list[list[dict[str, Any]]] = []
    for sampler in (make_sampler("tpe", 0), PlainTPE(0)):
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for _ in range(40):
            trial = study.ask()
            method = trial.suggest_categorical("method", ("lora", "none"))
            size = trial.suggest_int("size", 1, 32) if method == "lora" else 0
            study.tell(trial, size * (40 - size) - trial.suggest_float("rate", 0.0, 1.0))
        asked.append([one.params for one in study.trials])
    assert asked[0] == asked[1]


def test_tpe_reads_again_where_earlier_trials_are_others() -> None:
    sampler = make_sampler("tpe", 0)
    whole = asked("tpe", 20)
    for count in (15, 12, 18):
        study = new_study(sampler)
        for trial in whole.trials[:count]:
            study.add_trial(trial)
        assert step(study) == whole.trials[count].params


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(name: str) -> None:
    first, again, other = (asked(name, 4, seed) for seed in (0, 0, 1))
    assert [one.params for one in first.trials] == [one.params for one in again.trials]
    assert [one.params for one in first.trials] != [one.params for one in other.trials]


@pytest.mark.parametrize(
    ("name", "length", "stops"),
    [
        ("random", 12, (1, 5, 11)),
        ("tpe", 24, (1, 9, 10, 12, 17, 23)),
        ("nsga2", 100, (5, 31, 57, 72, 99)),
        ("nsga3", 100, (5, 31, 57, 72, 99)),
        ("gp", 15, (3, 10, 13)),
    ],
)
def test_a_study_rebuilt_from_its_first_trials_asks_what_the_whole_one_asked(
    name: str, length: int, stops: tuple[int, ...]
) -> None:
    whole = asked(name, length)
    for stop in stops:
        study = new_study(make_sampler(name, 0))
        for trial in whole.trials[:stop]:
            study.add_trial(trial)
        for number in range(stop, min(length, stop + 4)):
            assert step(study) == whole.trials[number].params, f"trial {number} after a stop at {stop}"


@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_trial_does_not_change_the_next(name: str) -> None:
    """What Ctrl-C leaves in the live study is gone with it; the sampler must not remember it either."""
    sampler = make_sampler(name, 0)
    whole = asked(name, 6)
    study = new_study(sampler)
    for trial in whole.trials[:4]:
        study.add_trial(trial)
    interrupted = study.ask()
    interrupted.suggest_int("size", 1, 32)
    again = new_study(sampler)
    for trial in whole.trials[:4]:
        again.add_trial(trial)
    assert [step(again), step(again)] == [one.params for one in whole.trials[4:]]


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
