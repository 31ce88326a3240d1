"""The study on disk: whole trials or none, in any order, one process at a time, plain Optuna inside."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from autopeft.core.evaluation import Evaluation, TrialRecord
from autopeft.core.objectives import Objective, resolve_constraints, resolve_objectives
from autopeft.core.replicates import with_replicate
from autopeft.optimization.samplers import make_sampler
from autopeft.optimization.study_store import STUDY_FILE, StudyStore, load_study
from tests.records import OBJECTIVES, completed, random_configuration, synthetic_records

TWO = resolve_objectives(("accuracy", "trainable_parameters"), ("accuracy",))
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


def told(store: StudyStore, number: int, *, fails: bool = False) -> TrialRecord:
    """Tell a made-up trial."""
    record = made_up(number, fails=fails)
    assert store.tell(record, {"rank": 1 + number}, RANKS) == [record]
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
        store.tell(record, {"rank": 1 + record.number}, RANKS)
    store.tell(twice)
    store.close()
    store = opened(tmp_path)
    assert [record.number for record in store.records] == [0, 3, 5, 6]
    for record in (whole[7], whole[1], paused(whole[4])):
        store.tell(record, {"rank": 1 + record.number}, RANKS)
    store.tell(whole[5])
    store.tell(whole[2], {"rank": 3}, RANKS)
    store.tell(whole[4])
    expected = [twice if record.number == 3 else record for record in whole]
    assert store.records == expected
    view = store.sampler_view(RandomSampler()).get_trials()
    assert [trial.params["rank"] for trial in view] == list(range(1, 9))
    assert [trial.values for trial in view] == [None if n == 6 else values_of(expected[n]) for n in range(8)]
    store.close()
    assert opened_records(tmp_path) == expected
    assert load_study(tmp_path)[1] == expected
    for record in whole:
        trial = saved(tmp_path, record.number)
        assert trial.params == {"rank": 1 + record.number}
        assert trial.values == (None if record.number == 6 else values_of(record))


def opened_records(folder: Path) -> Sequence[TrialRecord]:
    store = opened(folder)
    store.close()
    return store.records


def test_a_study_has_an_id_of_its_own_that_stays(tmp_path: Path) -> None:
    stores = [opened(tmp_path / name) for name in "ab"]
    for store in stores:
        store.close()
    assert len({store.study_id for store in stores}) == 2
    again = opened(tmp_path / "a")
    again.close()
    assert again.study_id == stores[0].study_id == load_study(tmp_path / "a")[0]["study_id"]


@pytest.mark.parametrize("garbage", [b'{"op_code": 4, "wor', b"\0\0\0", b"{"])
def test_half_a_line_is_cut_and_everything_before_kept(tmp_path: Path, garbage: bytes) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    whole = journal.read_bytes()
    journal.write_bytes(whole + garbage)
    assert load_study(tmp_path)[1] == records
    assert journal.read_bytes() == whole + garbage, "reading changes nothing"
    store = opened(tmp_path)
    assert store.records == records
    assert journal.read_bytes() == whole
    records.append(told(store, 4))
    store.close()
    assert load_study(tmp_path)[1] == records
    assert len(optunas(tmp_path).trials) == 5


def test_a_lock_that_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    records = filled(tmp_path)
    (tmp_path / f"{STUDY_FILE}.lock").write_text("of a process that was killed")
    assert load_study(tmp_path)[1] == records
    assert opened_records(tmp_path) == records
    assert not (tmp_path / f"{STUDY_FILE}.lock").exists()


@pytest.mark.parametrize("place", [0, 3, -1])
def test_a_blank_line_is_harmless(tmp_path: Path, place: int) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    lines.insert(place if place >= 0 else len(lines), b" \n\n")
    journal.write_bytes(b"".join(lines))
    assert load_study(tmp_path)[1] == records
    store = opened(tmp_path)
    assert store.records == records
    told(store, 4)
    store.close()
    assert len(optunas(tmp_path).trials) == 5, "for plain Optuna too"


@pytest.mark.parametrize("garbage", [b'{"op_code": 4, "wor\n', b"\0\xff\0\n", b"7\n"])
def test_a_damaged_line_is_named_with_its_mend(tmp_path: Path, garbage: bytes) -> None:
    records = filled(tmp_path)
    journal = tmp_path / STUDY_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:-2], garbage, *lines[-1:]])
    journal.write_bytes(damaged)
    message = rf"Line {len(lines) - 1} of .*{STUDY_FILE} is damaged.*`head -n {len(lines) - 2} "
    for read in (opened, load_study):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)
    assert journal.read_bytes() == damaged
    mend = f"head -n {len(lines) - 2} {STUDY_FILE} > mended && mv mended {STUDY_FILE}"
    subprocess.run(mend, shell=True, check=True, cwd=tmp_path)
    assert opened_records(tmp_path) == records[:2]


def test_a_journal_cut_anywhere_keeps_the_whole_trials(tmp_path: Path) -> None:
    records = filled(tmp_path / "whole")
    content = (tmp_path / "whole" / STUDY_FILE).read_bytes()
    draw = random.Random(0)
    for case in range(12):
        folder = tmp_path / str(case)
        folder.mkdir()
        (folder / STUDY_FILE).write_bytes(content[: draw.randrange(len(content))])
        store = opened(folder)
        known = len(store.records)
        assert store.records == records[:known]
        told(store, known)
        store.close()
        assert len(load_study(folder)[1]) == known + 1


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
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
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
    with pytest.raises(ValueError, match="Line 1 of"):
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
    plots = optuna.visualization.matplotlib
    plots.plot_pareto_front(study)
    plots.plot_slice(study, target=lambda trial: trial.values[0], target_name="accuracy")


def test_optuna_is_told_which_trials_break_a_constraint(tmp_path: Path) -> None:
    constraints = resolve_constraints({"trainable_parameters": 1000}, ("accuracy", "f1_macro"))
    store = StudyStore(tmp_path, "questions", OBJECTIVES, constraints)
    evaluation = Evaluation(
        configuration=random_configuration(random.Random(0)),
        status="infeasible",
        reason="too many parameters",
        values={"trainable_parameters": 1500.0},
    )
    store.tell(TrialRecord(number=0, evaluation=evaluation), {"rank": 9}, RANKS)
    failed = replace(evaluation, status="failed", values={})
    store.tell(TrialRecord(number=1, evaluation=failed), {"rank": 8}, RANKS)
    view = store.sampler_view(RandomSampler())
    store.close()
    for study in (optunas(tmp_path), view):
        first, second = study.get_trials()
        assert first.state is TrialState.PRUNED
        assert first.constraints["trainable_parameters"] > 0
        assert second.constraints == {"trainable_parameters": 0.0}


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
    store.tell(paused(whole), {"rank": 1}, RANKS)
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
    store.tell(paused(whole), {"rank": 1}, RANKS)
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
        store.tell(paused(record), {"rank": 1}, RANKS)
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
    for study in (store.sampler_view(RandomSampler()), optunas(tmp_path)):
        for trial in study.get_trials():
            assert (trial.state, trial.values) == (TrialState.COMPLETE, values_of(whole))
    store.close()
    assert load_study(tmp_path)[1] == [whole, twin]


def test_samplers_are_shown_means_and_what_is_expected(tmp_path: Path) -> None:
    store = opened(tmp_path)
    first = made_up(0)
    store.tell(first, {"rank": 1}, RANKS)
    store.tell(replace(first, number=1, duplicate_of=0), {"rank": 1}, RANKS)
    store.tell(paused(made_up(2)), {"rank": 3}, RANKS, {"a sampler's": "note"})
    other = replace(first.evaluation, seed=1, values={**first.evaluation.values, "accuracy": 0.1})
    twice = replace(first, evaluation=with_replicate(first.evaluation, other, {"accuracy": 0.0}))
    store.tell(twice)
    means = values_of(twice)
    assert means != values_of(first)
    view = store.sampler_view(RandomSampler(), expected=lambda evaluation: [0.5, 7.0, evaluation.fidelity])
    assert [trial.values for trial in view.trials] == [means, means, [0.5, 7.0, 0.5]]
    assert view.trials[2].system_attrs == {"a sampler's": "note"}
    states = [trial.state for trial in store.sampler_view(RandomSampler()).trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
    assert [trial.values for trial in optunas(tmp_path).trials] == [values_of(first), values_of(first), None]
    view.tell(view.ask(), [0.0, 0.0, 0.0])
    assert len(store.records) == 3, "what is asked of a view is kept nowhere"
    store.close()


def test_trials_that_run_are_in_the_view(tmp_path: Path) -> None:
    class Suggestion:
        parameters = {"rank": 5}  # noqa: RUF012
        distributions = RANKS
        attributes = {"a sampler's": "note"}  # noqa: RUF012

    store = opened(tmp_path)
    told(store, 0)
    view = store.sampler_view(RandomSampler(), running=[Suggestion()])
    running = view.trials[1]
    assert (running.state, running.params) == (TrialState.RUNNING, {"rank": 5})
    assert running.system_attrs == {"a sampler's": "note"}
    assert view.ask().number == 2
    store.close()


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_a_resumed_search_asks_what_an_uninterrupted_one_asks(name: str, tmp_path: Path) -> None:
    def ask(store: StudyStore, record: TrialRecord) -> int:
        view = store.sampler_view(make_sampler(name, 3))
        trial = view.ask()
        rank = trial.suggest_int("rank", 1, 64)
        attributes = view.get_trials()[-1].system_attrs
        store.tell(replace(record, number=trial.number), trial.params, trial.distributions, attributes)
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
