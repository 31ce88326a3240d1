"""The study on disk: whole trials or none, one process at a time, plain Optuna inside."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.optimization.samplers import make_sampler
from autopeft.optimization.seed_replication import with_replicate
from autopeft.optimization.study_store import STUDY_FILE, StudyStore, load_study
from tests.records import OBJECTIVES, completed, random_configuration

TWO = resolve_objectives(("accuracy", "trainable_parameters"), ("accuracy",))


def opened(folder: Path, objectives: Sequence[Objective] = OBJECTIVES, name: str = "questions") -> StudyStore:
    return StudyStore(folder, name, objectives, make_sampler("random", 0))


def run_trial(store: StudyStore, *, fails: bool = False) -> TrialRecord:
    """Ask, tell and save one made-up trial."""
    trial = store.live.ask()
    rank = trial.suggest_int("rank", 1, 64)
    draw = random.Random(rank)
    configuration = random_configuration(draw)
    if fails:
        failed = Evaluation(configuration=configuration, status="failed", reason="diverged: loss is nan")
        record = TrialRecord(number=trial.number, evaluation=failed)
        store.live.tell(trial, state=TrialState.FAIL)
    else:
        record = completed(trial.number, configuration, draw, baseline="head only" if rank % 2 else None)
        store.live.tell(trial, [record.evaluation.values[one.name] for one in OBJECTIVES])
    store.save([record])
    return record


def filled(folder: Path, count: int = 4) -> list[TrialRecord]:
    store = opened(folder)
    store.check_identity({"search": {"seed": "0"}})
    records = [run_trial(store, fails=number == 1) for number in range(count)]
    store.close()
    return records


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    records = filled(tmp_path / "deep" / "search")
    store = opened(tmp_path / "deep" / "search")
    assert store.records == records
    assert [trial.number for trial in store.live.trials] == [0, 1, 2, 3]
    assert [trial.state for trial in store.live.trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]
    assert run_trial(store).number == 4
    store.close()
    attributes, found = load_study(tmp_path / "deep" / "search")
    assert found[:4] == records
    assert attributes["name"] == "questions"
    assert attributes["identity"] == {"search": {"seed": "0"}}


def test_an_asked_trial_is_not_kept_before_it_is_saved(tmp_path: Path) -> None:
    filled(tmp_path)
    store = opened(tmp_path)
    first = store.live.ask().suggest_int("rank", 1, 64)
    store.close()
    store = opened(tmp_path)
    trial = store.live.ask()
    assert (trial.number, trial.suggest_int("rank", 1, 64)) == (4, first)
    store.close()


@pytest.mark.parametrize("garbage", [b'{"op_code": 4, "wor', b"\0\0\0", b"{"])
def test_half_a_line_is_cut_and_everything_before_kept(tmp_path: Path, garbage: bytes) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole + garbage)
    (tmp_path / f"{STUDY_FILE}.lock").write_text("of a process that was killed")
    store = opened(tmp_path)
    assert store.records == records
    assert journal.read_bytes().startswith(whole)
    assert run_trial(store).number == 4
    store.close()
    assert len(load_study(tmp_path)[1]) == 5


def test_a_journal_cut_anywhere_keeps_the_whole_trials(tmp_path: Path) -> None:
    records = filled(tmp_path / "whole")
    content = (tmp_path / "whole" / STUDY_FILE).read_bytes()
    draw = random.Random(0)
    for case in range(12):
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / STUDY_FILE).write_bytes(content[: draw.randrange(len(content))])
        store = opened(folder)
        assert store.records == records[: len(store.records)]
        assert run_trial(store).number == len(store.records) - 1
        store.close()


def test_a_running_search_can_be_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.check_identity({})
    record = run_trial(store)
    with (tmp_path / STUDY_FILE).open("ab") as handle:
        handle.write(b'{"op_code": 4, "wor')  # a line being written
    assert load_study(tmp_path)[1] == [record]
    store.close()


def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import sys, time",
            "from pathlib import Path",
            "from tests.optimization.test_study_store import opened",
            "store = opened(Path(sys.argv[1]))",
            "print('open', flush=True)",
            "sys.stdin.read()",
        ]
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=f"'questions' is being run by process {other.pid}"):
            opened(tmp_path)
        other.kill()
        other.wait()
        opened(tmp_path).close()  # the lock dies with its process


def test_a_store_that_could_not_be_opened_is_not_held(tmp_path: Path) -> None:
    (tmp_path / STUDY_FILE).write_bytes(b"not a journal\n")
    with pytest.raises(json.JSONDecodeError):
        opened(tmp_path)
    (tmp_path / STUDY_FILE).unlink()
    opened(tmp_path).close()


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
    other = resolve_objectives(("f1_macro", "trainable_parameters", "peak_memory"), ("f1_macro",))
    for objectives in (TWO, other):
        with pytest.raises(ValueError, match=r"(?s)'questions'.*objectives.*accuracy"):
            opened(tmp_path, objectives)
    assert load_study(tmp_path) == before
    store = opened(tmp_path)
    assert store.records == records
    store.close()


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


def test_plain_optuna_opens_the_study(tmp_path: Path) -> None:
    records = filled(tmp_path)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / STUDY_FILE)))
    study = optuna.load_study(study_name=None, storage=storage)
    assert study.study_name == "questions"
    assert study.metric_names == [one.name for one in OBJECTIVES]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3]
    expected = [records[0].evaluation.values[one.name] for one in OBJECTIVES]
    assert study.trials[0].values == expected
    assert study.trials[1].state is TrialState.FAIL
    assert len(study.best_trials) >= 1


def test_attributes_are_kept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.set_attribute("axes", [["accuracy", 0.2, 1.0]])
    store.close()
    assert load_study(tmp_path)[0]["axes"] == [["accuracy", 0.2, 1.0]]


def paused_trial(store: StudyStore) -> TrialRecord:
    """Ask, tell and save a trial as paused; return what it is when it has completed."""
    record = run_trial(store)
    trial = store.live.ask()
    trial.suggest_int("rank", 1, 64)
    whole = replace(record, number=trial.number)
    store.live.tell(trial, [record.evaluation.values[one.name] for one in OBJECTIVES])
    paused = replace(record.evaluation, status="paused", reason="half of it", fidelity=0.5)
    store.save([replace(whole, evaluation=paused)])
    return whole


def test_a_trial_that_was_over_when_the_process_was_killed_is_finished(tmp_path: Path) -> None:
    store = opened(tmp_path)
    record = paused_trial(store)
    saved = store._saved.get_trials(deepcopy=False)[record.number]
    assert saved.state == TrialState.RUNNING
    text = json.dumps(record.to_dict())  # and killed before the state was written
    store._saved._storage.set_trial_user_attr(saved._trial_id, "autopeft:record", text)
    store.close()
    again = opened(tmp_path)
    values = [record.evaluation.values[one.name] for one in OBJECTIVES]
    for study in (again.live, again._saved):
        trial = study.get_trials()[record.number]
        assert (trial.state, trial.values) == (TrialState.COMPLETE, values)
    again.close()


@pytest.mark.parametrize("is_killed", [False, True], ids=["updated", "killed in between"])
def test_duplicates_of_a_paused_trial_end_with_it(is_killed: bool, tmp_path: Path) -> None:
    store = opened(tmp_path)
    whole = paused_trial(store)
    trial = store.live.ask()
    trial.suggest_int("rank", 1, 64)
    store.live.tell(trial, [0.5] * len(OBJECTIVES))  # what was expected of it
    paused = replace(whole.evaluation, status="paused", reason="half of it", fidelity=0.5)
    twin = replace(whole, number=trial.number, evaluation=paused, duplicate_of=whole.number)
    store.save([twin])
    expected = [whole, replace(twin, evaluation=whole.evaluation)]
    if is_killed:
        saved = store._saved.get_trials(deepcopy=False)[whole.number]
        text = json.dumps(whole.to_dict())
        store._saved._storage.set_trial_user_attr(saved._trial_id, "autopeft:record", text)
        store.close()
        store = opened(tmp_path)
    else:
        assert store.update(whole) == expected
    assert store.records[-2:] == expected
    values = [whole.evaluation.values[one.name] for one in OBJECTIVES]
    for study in (store.live, store._saved):
        for one in study.get_trials()[-2:]:
            assert (one.state, one.values) == (TrialState.COMPLETE, values)
    store.close()
    assert load_study(tmp_path)[1][-2:] == expected


def test_a_search_that_paused_does_not_go_on_without_rungs(tmp_path: Path) -> None:
    store = opened(tmp_path)
    paused_trial(store)
    store.close()
    with pytest.raises(ValueError, match="trials pause there, none does here"):
        opened(tmp_path)


def test_means_replace_values_for_duplicates_and_genetic_samplers_too(tmp_path: Path) -> None:
    store = opened(tmp_path)
    record = run_trial(store)
    values = [record.evaluation.values[one.name] for one in OBJECTIVES]
    twin = store.live.ask()
    twin.suggest_int("rank", 1, 64)
    store.live.tell(twin, values)
    store.save([TrialRecord(number=twin.number, evaluation=record.evaluation, duplicate_of=record.number)])
    before = store.live
    other = replace(record.evaluation, seed=1, values={**record.evaluation.values, "accuracy": 0.1})
    record = replace(record, evaluation=with_replicate(record.evaluation, other, {"accuracy": 0.0}))
    store.update(record)
    means = [record.evaluation.values[one.name] for one in OBJECTIVES]
    assert means != values
    assert store.live is before
    assert [trial.values for trial in store.live.trials] == [means, means]
    assert [trial.values for trial in store._saved.trials] == [values, values]
    # The parents of a generation were chosen by the values before.
    before._storage.set_study_system_attr(before._study_id, "nsgaii:parents", [0])
    third = replace(other, seed=2)
    store.update(replace(record, evaluation=with_replicate(record.evaluation, third, {"accuracy": 0.0})))
    assert not store.live._storage.get_study_system_attrs(store.live._study_id).keys() & {"nsgaii:parents"}
    store.close()
    again = opened(tmp_path)
    assert [one.values for one in again.live.trials] == [one.values for one in store.live.trials]
    again.close()
