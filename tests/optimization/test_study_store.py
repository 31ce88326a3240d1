"""The study on disk: whole trials or none, in any order, one process at a time, plain Optuna inside."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.trial import TrialState

from autopeft.core.evaluation import Evaluation, TrialRecord, with_replicate
from autopeft.core.objectives import resolve_constraints, resolve_objectives
from autopeft.optimization.samplers import make_sampler
from autopeft.optimization.study_store import STUDY_FILE, StudyStore, load_study
from tests.records import METRICS, OBJECTIVES, random_configuration, synthetic_records
from tests.studies import (
    TWO,
    filled,
    made_up,
    opened,
    opened_records,
    optunas,
    paused,
    proposed,
    saved,
    told,
    values_of,
)

ROOT = Path(__file__).parents[2]


def test_what_was_told_is_there_again(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "search"
    records = filled(folder)
    store = opened(folder)
    assert store.records == records
    records.append(told(store, 4))
    store.close()
    attributes, found = load_study(folder)
    assert found == records
    assert attributes["name"] == "questions"
    assert attributes["identity"] == {"search": {"seed": "0"}}


def test_trials_may_be_told_in_any_order(tmp_path: Path) -> None:
    """As trials that are trained at once finish, one of them after a restart; some pause and go on."""
    whole = [made_up(number, fails=number == 6) for number in range(8)]
    again = replace(whole[3].evaluation, seed=1, values={**whole[3].evaluation.values, "accuracy": 0.1})
    twice = replace(whole[3], evaluation=with_replicate(whole[3].evaluation, again, {"accuracy": 0.0}))
    store = opened(tmp_path)
    for record in (whole[3], paused(whole[5]), whole[0], whole[6]):
        store.tell(record, proposed(record, 1 + record.number))
    store.tell(twice)
    store.close()
    store = opened(tmp_path)
    assert [record.number for record in store.records] == [0, 3, 5, 6]
    for record in (whole[7], whole[1], paused(whole[4])):
        store.tell(record, proposed(record, 1 + record.number))
    store.tell(whole[5])
    store.tell(whole[2], proposed(whole[2], 3))
    store.tell(whole[4])
    expected = [twice if record.number == 3 else record for record in whole]
    assert store.records == expected
    view = store.view().get_trials()
    assert [trial.params["rank"] for trial in view] == list(range(1, 9))
    assert [trial.values for trial in view] == [None if n == 6 else values_of(expected[n]) for n in range(8)]
    store.close()
    assert opened_records(tmp_path) == expected
    assert load_study(tmp_path)[1] == expected
    for record in whole:
        trial = saved(tmp_path, record.number)
        assert trial.params == {"rank": 1 + record.number}
        assert trial.values == (None if record.number == 6 else values_of(record))


def test_a_study_has_an_id_of_its_own_that_stays(tmp_path: Path) -> None:
    stores = [opened(tmp_path / name) for name in "ab"]
    for store in stores:
        store.close()
    assert len({store.study_id for store in stores}) == 2
    again = opened(tmp_path / "a")
    again.close()
    assert again.study_id == stores[0].study_id == load_study(tmp_path / "a")[0]["study_id"]


@pytest.mark.slow
def test_a_process_that_is_killed_loses_no_trial_it_was_told(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import os, signal, sys",
            "from pathlib import Path",
            "from tests.optimization.test_study_store import opened, told",
            "store = opened(Path(sys.argv[1]))",
            "for number in (2, 0, 1): told(store, number)",
            "os.kill(os.getpid(), signal.SIGKILL)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert opened_records(tmp_path) == [made_up(number) for number in range(3)]


def test_a_running_search_can_be_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.check_identity({})
    record = told(store, 0)
    with (tmp_path / STUDY_FILE).open("ab") as handle:
        handle.write(b'{"op_code": 4, "wor')  # a line being written
    assert load_study(tmp_path)[1] == [record]
    store.close()


def test_another_identity_names_what_differs(tmp_path: Path) -> None:
    filled(tmp_path)
    store = opened(tmp_path)
    with pytest.raises(ValueError, match=r"'questions'.*\(search\.seed: '0' there, '1' here\)"):
        store.check_identity({"search": {"seed": "1"}})
    store.check_identity({"search": {"seed": "0"}})
    store.close()


def test_other_objectives_are_refused_and_change_nothing(tmp_path: Path) -> None:
    records = filled(tmp_path)
    before = load_study(tmp_path)
    other = resolve_objectives(("f1_macro", "trainable_parameters", "peak_memory"), METRICS)
    for objectives in (TWO, other):
        with pytest.raises(ValueError, match=r"(?s)'questions'.*objectives.*accuracy"):
            opened(tmp_path, objectives)
    assert load_study(tmp_path) == before
    assert opened_records(tmp_path) == records


def test_the_file_of_another_search_is_refused(tmp_path: Path) -> None:
    records = filled(tmp_path)
    with pytest.raises(ValueError, match=r"'answers'.*name: 'questions' there, 'answers' here"):
        opened(tmp_path, name="answers")
    assert opened_records(tmp_path) == records


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be kept in .*: Not a directory.*folder="):
        opened(tmp_path / "file" / "search")


def test_no_search_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no search in"):
        load_study(tmp_path)
    (tmp_path / STUDY_FILE).write_bytes(b"")  # killed before anything was written
    with pytest.raises(ValueError, match="There is no search in"):
        load_study(tmp_path)


def test_reading_a_study_loads_nothing_that_trains(tmp_path: Path) -> None:
    filled(tmp_path)
    script = "\n".join(
        [
            "import sys, types",
            "package = types.ModuleType('autopeft')  # without what the package offers",
            "package.__path__ = ['autopeft']",
            "sys.modules['autopeft'] = package",
            "from pathlib import Path",
            "from autopeft.optimization.study_store import load_study",
            "assert len(load_study(Path(sys.argv[1]))[1]) == 4",
            "heavy = {'torch', 'mlflow', 'lightning', 'transformers', 'peft', 'datasets', 'matplotlib'}",
            "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()",
        ]
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_plain_optuna_opens_the_study(tmp_path: Path) -> None:
    records = filled(tmp_path)
    study = optunas(tmp_path)
    assert study.study_name == "questions"
    assert study.metric_names == [objective.name for objective in OBJECTIVES]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3]
    assert [trial.params for trial in study.trials] == [{"rank": rank} for rank in range(1, 5)]
    assert study.trials[0].values == values_of(records[0])
    assert study.trials[1].state is TrialState.FAIL
    assert len(study.best_trials) >= 1
    for plots in (optuna.visualization, optuna.visualization.matplotlib):
        plots.plot_pareto_front(study)
        plots.plot_slice(study, target=lambda trial: trial.values[0], target_name="accuracy")
    figure = optuna.visualization.plot_pareto_front(study)
    drawn = {point for trace in figure.data for point in zip(trace.x, trace.y, trace.z, strict=True)}
    assert drawn == {tuple(trial.values) for trial in study.trials if trial.values}


def test_optuna_is_told_which_trials_break_a_constraint(tmp_path: Path) -> None:
    constraints = resolve_constraints({"trainable_parameters": 1000}, METRICS)
    store = StudyStore(tmp_path, "questions", OBJECTIVES, constraints)
    evaluation = Evaluation(
        configuration=random_configuration(random.Random(0)),
        status="infeasible",
        reason="too many parameters",
        values={"trainable_parameters": 1500.0},
    )
    infeasible = TrialRecord(number=0, evaluation=evaluation)
    store.tell(infeasible, proposed(infeasible, 9))
    failed = TrialRecord(number=1, evaluation=replace(evaluation, status="failed", values={}))
    store.tell(failed, proposed(failed, 8))
    view = store.view()
    store.close()
    for study in (optunas(tmp_path), view):
        first, second = study.get_trials()
        assert first.state is TrialState.PRUNED
        assert first.constraints["trainable_parameters"] > 0
        assert second.constraints == {"trainable_parameters": 0.0}


def test_parameters_that_no_sampler_reads_are_in_the_file_alone(tmp_path: Path) -> None:
    records = filled(tmp_path)
    store = StudyStore(tmp_path, "questions", OBJECTIVES, keeps_parameters=False)
    records.append(told(store, 4))
    assert store.records == records
    held = [value for trial in store._saved() for value in (*trial.params, *trial.distributions)]
    assert not held, "Optuna keeps no parameters in memory"
    with pytest.raises(AssertionError, match="mislead a sampler"):
        store.view()
    store.close()
    store = opened(tmp_path)
    assert [trial.params for trial in store.view().trials] == [{"rank": rank} for rank in range(1, 6)]
    store.close()
    assert [trial.params for trial in optunas(tmp_path).trials] == [{"rank": rank} for rank in range(1, 6)]


def test_a_study_s_records_share_equal_sites_and_adapters(tmp_path: Path) -> None:
    records = filled(tmp_path)
    _, found = load_study(tmp_path)
    drawn = [record.evaluation.configuration.adapters for record in records]
    read = [record.evaluation.configuration.adapters for record in found]
    for several in (read, [*drawn, *read]):
        adapters = [entry for configuration in several for entry in configuration.values()]
        assert len({id(entry) for entry in adapters}) == len({*adapters}) < len(adapters)
    sites = [site for configuration in read for site in configuration]
    assert len({id(site) for site in sites}) == len({*sites}) < len(sites)


def test_attributes_are_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.set_attribute("axes", [["accuracy", 0.2, 1.0]])
    size = (tmp_path / STUDY_FILE).stat().st_size
    store.set_attribute("axes", [["accuracy", 0.2, 1.0]])
    assert (tmp_path / STUDY_FILE).stat().st_size == size
    store.close()
    assert load_study(tmp_path)[0]["axes"] == [["accuracy", 0.2, 1.0]]


def test_a_paused_trial_runs_in_the_file_until_it_is_over(tmp_path: Path) -> None:
    store = opened(tmp_path)
    whole = made_up(0)
    store.tell(paused(whole), proposed(whole, 1))
    assert saved(tmp_path, 0).state is TrialState.RUNNING
    store.tell(whole)
    trial = saved(tmp_path, 0)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, values_of(whole))
    store.close()


def interrupted(*arguments: Any) -> None:
    """Die in place of what should be done."""
    raise KeyboardInterrupt


def test_a_trial_that_was_over_when_the_process_was_killed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    whole = made_up(0)
    store.tell(paused(whole), proposed(whole, 1))
    with monkeypatch.context() as patch:
        patch.setattr(JournalStorage, "set_trial_state_values", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.tell(whole)
    store.close()
    assert saved(tmp_path, 0).state is TrialState.RUNNING
    assert opened_records(tmp_path) == [whole]
    trial = saved(tmp_path, 0)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, values_of(whole))


@pytest.mark.parametrize("is_killed", [False, True], ids=["told", "killed in between"])
def test_duplicates_of_a_paused_trial_end_with_it(
    is_killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    whole = made_up(0)
    twin = replace(whole, number=1, duplicate_of=0)
    for record in (whole, twin):
        store.tell(paused(record), proposed(record, 1))
    if is_killed:
        with monkeypatch.context() as patch:
            patch.setattr(StudyStore, "_end_duplicates", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.tell(whole)
        store.close()
        store = opened(tmp_path)
    else:
        assert store.tell(whole) == [whole, twin]
    assert store.records == [whole, twin]
    for study in (store.view(), optunas(tmp_path)):
        for trial in study.get_trials():
            assert (trial.state, trial.values) == (TrialState.COMPLETE, values_of(whole))
    store.close()
    assert load_study(tmp_path)[1] == [whole, twin]


def test_samplers_are_shown_means_and_what_is_expected(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first = made_up(0)
    store.tell(first, proposed(first, 1))
    store.tell(replace(first, number=1, duplicate_of=0), proposed(first, 1))
    store.tell(paused(made_up(2)), proposed(made_up(2), 3, {"a sampler's": "note"}))
    other = replace(first.evaluation, seed=1, values={**first.evaluation.values, "accuracy": 0.1})
    twice = replace(first, evaluation=with_replicate(first.evaluation, other, {"accuracy": 0.0}))
    store.tell(twice)
    means = values_of(twice)
    assert means != values_of(first)
    view = store.view(expected=lambda evaluation: [0.5, 7.0, evaluation.fidelity])
    assert [trial.values for trial in view.trials] == [means, means, [0.5, 7.0, 0.5]]
    assert view.trials[2].system_attrs == {"a sampler's": "note"}
    states = [trial.state for trial in store.view().trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    assert [trial.values for trial in optunas(tmp_path).trials] == [values_of(first), values_of(first), None]
    view.tell(view.ask(), [0.0, 0.0, 0.0])
    assert len(store.records) == 3, "what is asked of a view is kept nowhere"
    store.close()


def test_trials_that_run_are_in_the_view(tmp_path: Path) -> None:
    store = opened(tmp_path)
    told(store, 0)
    view = store.view(running=[proposed(made_up(1), 5, {"a sampler's": "note"})])
    running = view.trials[1]
    assert (running.state, running.params) == (TrialState.RUNNING, {"rank": 5})
    assert running.system_attrs == {"a sampler's": "note"}
    assert view.ask().number == 2
    store.close()


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_resumed_search_asks_what_an_uninterrupted_one_asks(name: str, tmp_path: Path) -> None:
    def ask(store: StudyStore, record: TrialRecord) -> int:
        view = store.view()
        sampler = make_sampler(name, 3, record.number)
        assert isinstance(sampler, BaseSampler)
        view.sampler = sampler
        trial = view.ask()
        rank = trial.suggest_int("rank", 1, 64)
        attributes = view.get_trials()[-1].system_attrs
        store.tell(replace(record, number=trial.number), proposed(record, rank, attributes))
        return rank

    records = [record for record in synthetic_records(50) if record.evaluation.status == "complete"][:30]
    store = opened(tmp_path / "whole")
    whole = [ask(store, record) for record in records]
    store.close()
    found = []
    for part in (records[:13], records[13:24], records[24:]):
        store = opened(tmp_path / "cut")
        found += [ask(store, record) for record in part]
        store.close()
    assert found == whole
