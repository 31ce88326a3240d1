"""A finished trial's outcome changes in the live study, as if the study had been made anew."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.study import Study
from optuna.trial import TrialState, create_trial

from autopeft.optimization.changed_trial import change_trial
from autopeft.optimization.study_store import StudyStore
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.search_spaces import PerLayer
from tests.learnable import tiny_search


def study_of(storage: str | None = None) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize"], storage=storage)
    for number in range(3):
        study.add_trial(
            create_trial(
                params={"rank": number}, distributions={"rank": IntDistribution(0, 9)}, values=[number, 5]
            )
        )
    return study


@pytest.mark.parametrize(
    ("state", "values"),
    [(TrialState.COMPLETE, [9.0, 4.0]), (TrialState.FAIL, None)],
    ids=("better", "failed"),
)
def test_a_trial_has_its_new_outcome_and_its_old_parameters(
    state: TrialState, values: list[float] | None
) -> None:
    study = study_of()
    before = list(study.get_trials(deepcopy=False))
    assert change_trial(study, 1, state, values)
    after = study.get_trials(deepcopy=False)
    assert (after[1].state, after[1].values, after[1].number) == (state, values, 1)
    assert after[1].params is before[1].params
    assert before[1].values == [1, 5]
    assert [after[0] is before[0], after[1] is before[1], after[2] is before[2]] == [True, False, True]
    assert study.ask().number == 3


def test_a_storage_that_is_not_in_memory_is_left_alone(tmp_path: Path) -> None:
    study = study_of(f"sqlite:///{tmp_path}/study.db")
    assert not change_trial(study, 1, TrialState.COMPLETE, [9.0, 4.0])
    assert study.trials[1].values == [1, 5]


@pytest.mark.parametrize("is_known", [True, False], ids=("changed", "made anew"))
def test_samplers_see_what_a_study_made_anew_would_show(
    is_known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow = StudyStore._follow
    seen: list[tuple[Study, Study]] = []

    def compared(store: StudyStore, changed: int) -> None:
        before = store.live
        follow(store, changed)
        followed = store.live
        store._refresh(followed.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        anew, store.live = store.live, followed
        seen.append((before, followed))
        shown, expected = (
            [(trial.number, trial.state, trial.values, copy.copy(trial.params)) for trial in one.trials]
            for one in (followed, anew)
        )
        assert shown == expected
        assert all(math.isfinite(one) for _, _, values, _ in shown for one in values or ())

    monkeypatch.setattr(StudyStore, "_follow", compared)
    if not is_known:
        monkeypatch.setattr("autopeft.optimization.study_store.change_trial", _unknown)
    search = tiny_search(
        tmp_path,
        space=PerLayer(methods=("lora",), ranks=(1, 4), roles=("query", "value"), learning_rate=(1e-3, 3e-2)),
        fidelity=SuccessiveHalving(rungs=(1 / 3, 2 / 3), reduction_factor=2),
        seeds=2,
        score_check=False,
    )
    search.run(trials=14, progress=False)
    assert len(seen) > 8
    assert all(before is followed for before, followed in seen) == is_known


def _unknown(*arguments: Any) -> bool:
    return False
