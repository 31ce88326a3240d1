"""Trained again with other seeds, a member of the front has the means of its trainings, or leaves it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import Tensor

from autopeft import Search
from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import FAILED_SEEDS, Cost, Evaluation, TrialRecord, with_replicate
from autopeft.core.seeding import training_seed
from autopeft.optimization.budget import Budget
from autopeft.optimization.seed_replication import (
    cost_of_replicates,
    next_to_replicate,
    under_replicated,
)
from autopeft.optimization.study_store import STUDY_FILE, load_study
from autopeft.optimization.successive_halving import SuccessiveHalving
from autopeft.optimization.trial_records import Spent
from autopeft.reporting.front import ParetoFront
from autopeft.search_spaces import Uniform
from tests.learnable import outcomes, save_tiny_model, tiny_search
from tests.records import OBJECTIVES, synthetic_records

ACCURACY = OBJECTIVES[0]
WORST = {"accuracy": 0.25, "f1": 0.1}
TWO_RATES = Uniform(sizes={"rank": (1, 4)}, learning_rate=(1e-3, 3e-2))


def evaluated(seed: int, accuracy: float, **changes: float) -> Evaluation:
    values = {
        "accuracy": accuracy,
        "f1": accuracy / 2,
        "trainable_parameters": 100.0,
        "training_seconds": 3.0,
    }
    return Evaluation(
        configuration=Configuration({}),
        status="complete",
        values=values | changes,
        cost=Cost(wall_seconds=2.0, steps=8),
        seed=seed,
    )


def test_values_are_the_means_over_all_trainings() -> None:
    found = evaluated(1, 0.9, peak_memory_measured=5.0, training_seconds=1.0)
    for seed, accuracy in ((2, 0.6), (3, 0.3)):
        found = with_replicate(found, evaluated(seed, accuracy, peak_memory_measured=4.0), WORST)
    assert found.values["accuracy"] == pytest.approx(0.6)
    assert found.values["f1"] == pytest.approx(0.3)
    assert found.values["accuracy_std"] == pytest.approx(0.3)
    assert found.values["trainable_parameters"] == 100.0
    assert found.values["peak_memory_measured"] == 5.0
    assert found.values["training_seconds"] == pytest.approx(7 / 3)
    assert found.cost == Cost(wall_seconds=6.0, steps=24)
    assert (found.trainings, found.fidelity, found.seed, found.status) == (3, 1.0, 1, "complete")
    assert [values["accuracy"] for values in found.by_seed.values()] == [0.9, 0.6, 0.3]
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.format(ACCURACY) == f"{ACCURACY.format(0.6)} ± {ACCURACY.format(0.3)}"


def test_a_training_that_failed_counts_as_the_worst() -> None:
    failed = Evaluation(
        configuration=Configuration({}),
        status="failed",
        reason="diverged: training_loss is nan",
        values={"trainable_parameters": 100.0},
        cost=Cost(wall_seconds=1.0),
        seed=2,
    )
    found = with_replicate(evaluated(1, 0.85), failed, WORST | {"bleu": 0.0})
    assert "bleu" not in found.values, "no training measures it"
    assert found.status == "complete"
    assert found.values["accuracy"] == pytest.approx(0.55)
    assert found.values["f1"] == pytest.approx((0.425 + 0.1) / 2)
    assert found.values["f1_std"] > 0.2
    assert found.values[FAILED_SEEDS] == 1
    assert found.values["trainable_parameters"] == 100.0
    assert found.failures == {2: "diverged: training_loss is nan"}
    again = with_replicate(found, replace(failed, seed=3), WORST)
    assert again.values["accuracy"] == pytest.approx(0.45)
    assert again.values[FAILED_SEEDS] == 2
    assert again.failures.keys() == {2, 3}
    assert Evaluation.from_dict(json.loads(json.dumps(again.to_dict()))) == again


def test_members_with_the_fewest_trainings_come_first() -> None:
    records = [TrialRecord(number=number, evaluation=evaluated(number, 0.5)) for number in range(4)]
    repeated = with_replicate(evaluated(1, 0.5), evaluated(9, 0.5), WORST)
    records[1] = replace(records[1], evaluation=repeated)

    def due(members: Collection[int], seeds: int) -> TrialRecord | None:
        waiting = under_replicated([records[number] for number in members], seeds)
        return next_to_replicate(waiting, 3, may_wait=False)

    assert due((1, 2, 3), 3) is records[2]
    assert due((0, 1), 3) is records[0]
    assert due((1,), 2) is None
    assert due((1,), 3) is records[1]
    assert due((0, 1, 2), 1) is None


def test_a_member_is_trained_again_when_later_trials_have_left_it_there() -> None:
    """The second time after three of them, the third time after twenty-four; at the end at once."""

    def due(trials: int, trainings: int, **options: bool) -> bool:
        member = evaluated(0, 0.9)
        for seed in range(1, trainings):
            member = with_replicate(member, evaluated(seed, 0.9), WORST)
        waiting = under_replicated([TrialRecord(number=0, evaluation=member)], 3)
        return next_to_replicate(waiting, trials - 1, **options) is not None

    assert [due(trials, 1, may_wait=True) for trials in (1, 3, 4)] == [False, False, True]
    assert [due(trials, 2, may_wait=True) for trials in (4, 24, 25)] == [False, False, True]
    assert due(1, 1, may_wait=False)
    assert due(1, 2, may_wait=False)
    assert not due(100, 3, may_wait=True)


def test_repeats_that_are_due_are_kept_a_share_of_the_budget() -> None:
    twice = with_replicate(evaluated(1, 0.5), evaluated(9, 0.5), WORST)  # 4 seconds in all
    members = [
        TrialRecord(number=number, evaluation=evaluation)
        for number, evaluation in enumerate((evaluated(0, 0.5), twice))
    ]
    waiting = under_replicated(members, 3)
    assert cost_of_replicates(waiting, 3).wall_seconds == pytest.approx(2 * 2 + 2)
    assert cost_of_replicates(under_replicated(members, 1), 1) == Cost()
    budget = Budget(trials=100, hours=6 / 3600)
    spent = Spent(trials=3)
    assert budget.spent_share(spent) < 0.5
    assert budget.spent_share(spent, cost_of_replicates(waiting, 3)) >= 1
    more = Cost(cpu_seconds=4.0, gpu_seconds=40.0)
    assert Budget(cpu_seconds=8).spent_share(Spent(cost=Cost(cpu_seconds=2.0)), more) == 0.75
    assert Budget(trials=100).spent_share(spent, cost_of_replicates(waiting, 3)) == 0.03


def test_trials_that_a_lucky_member_drove_off_come_back() -> None:
    records = synthetic_records(30)
    front = ParetoFront(records, OBJECTIVES, ())
    for number in [point.number for point in sorted(front, key=lambda point: -point.values["accuracy"])][:4]:
        record = front.trial(number).record
        worse = replace(record.evaluation, values={**record.evaluation.values, "accuracy": 0.1}, fidelity=2.0)
        front = front.with_trial(replace(record, evaluation=worse))
        anew = ParetoFront(front.records, OBJECTIVES, ())
        assert front.members == anew.members
        assert number not in front.members
    assert len(front.members - ParetoFront(records, OBJECTIVES, ()).members) > 0


def test_what_trains_nothing_is_not_trained_again() -> None:
    untrained, trained = (
        TrialRecord(number=number, evaluation=evaluated(1, 0.5, trainable_parameters=count))
        for number, count in enumerate((0.0, 1.0))
    )
    assert under_replicated([untrained, trained], 3) == [trained]


def test_every_training_has_a_seed_of_its_own() -> None:
    seeds = [
        training_seed(seed, trial, training)
        for seed in range(4)
        for trial in range(40)
        for training in range(3)
    ]
    assert len({*seeds}) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert training_seed(3, 5, 1) == 3996450


@pytest.mark.parametrize("seeds", [0, -1, 1.5, True, "2"])
def test_seeds_are_a_number_of_trainings(seeds: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is a number of trainings from 1 up"):
        tiny_search(tmp_path, seeds=seeds)


def search(folder: Path, **settings: object) -> Search:
    return tiny_search(folder, **({"space": TWO_RATES, "seeds": 2} | settings))


@pytest.mark.parametrize(
    "fidelity",
    [None, SuccessiveHalving(rungs=(1 / 3,))],
    ids=("whole", "rungs"),
)
@pytest.mark.slow
def test_the_front_is_trained_with_every_seed(fidelity: SuccessiveHalving | None, tmp_path: Path) -> None:
    names = [objective.name for objective in OBJECTIVES]
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    small_search = search(tmp_path, halving=fidelity, tracking=tracking, objectives=names)
    front = small_search.run(trials=8, progress=False)
    assert all(point.record.evaluation.trainings == 2 for point in front)
    for record in front.records:
        evaluation = record.evaluation
        if evaluation.by_seed:
            seeds = [training_seed(0, record.number, training) for training in (0, 1)]
            assert list(evaluation.by_seed) == seeds
            alone = [small_search.open().evaluator.evaluate(evaluation.configuration, seed) for seed in seeds]
            assert [other.values["accuracy"] for other in alone] == [
                values["accuracy"] for values in evaluation.by_seed.values()
            ]
            mean = statistics.fmean(other.values["accuracy"] for other in alone)
            assert evaluation.values["accuracy"] == pytest.approx(mean)
    _, records = load_study(small_search.folder)
    assert records == list(front.records)
    shown = front.table()
    assert any("±" in str(cell) for cell in shown.columns[1].cells)
    _check_optuna(small_search.folder, records)
    _check_mlflow(tmp_path, records)


def run_and_watch(small_search: Search, **budget: Any) -> tuple[ParetoFront, list[int], list[int]]:
    """Return the front, the trials in their order, and for each repeat how many trials had come after."""
    begun: list[int] = []
    waited: list[int] = []

    def watch(record: TrialRecord, front: ParetoFront) -> None:
        if record.evaluation.trainings == 1:
            begun.append(record.number)
        else:
            waited.append(begun[-1] - record.number)

    return small_search.run(**budget, progress=False, callbacks=[watch]), begun, waited


def test_members_wait_for_later_trials_and_those_come_in_between(tmp_path: Path) -> None:
    """A second training comes when three trials with later numbers have begun, and the others at the end."""
    small_search = search(tmp_path)
    front, begun, waited = run_and_watch(small_search, trials=8)
    assert begun == list(range(8))
    assert waited[0] == 3
    assert all(point.record.evaluation.trainings == 2 for point in front)
    at_the_end = [point.number for point in front if 7 - point.number < 3]
    assert len([count for count in waited if count < 3]) >= len(at_the_end)


@pytest.mark.slow
def test_where_nothing_new_is_found_members_do_not_wait(tmp_path: Path) -> None:
    """The fourth training would come after 192 trials, and 100 that had all been tried end the search."""
    small_search = search(tmp_path, space=Uniform(sizes={"rank": (1, 2)}, learning_rate=1e-2), seeds=4)
    front = small_search.run(cpu_seconds=3600, progress=False)
    assert len(front.records) < 192
    assert all(point.record.evaluation.trainings == 4 for point in front)


@pytest.mark.slow
def test_a_budget_of_seconds_keeps_a_share_for_repeats(tmp_path: Path) -> None:
    """Every training is said to take a second; those that wait come before the last second is spent."""
    small_search = search(tmp_path, seeds=3, seed=12)
    train = small_search.open().evaluator.train

    def taking_a_second(*arguments: object, **options: object) -> object:
        trained = train(*arguments, **options)  # type: ignore[arg-type]
        return replace(trained, evaluation=replace(trained.evaluation, cost=Cost(cpu_seconds=1.0)))

    small_search.open().evaluator.train = taking_a_second  # type: ignore[method-assign, assignment]
    front, begun, waited = run_and_watch(small_search, cpu_seconds=20)
    assert any(count < 3 for count in waited)
    assert sum(record.evaluation.cost.cpu_seconds for record in front.records) <= 20
    # The trial that was begun last had nothing kept for it.
    assert all(point.record.evaluation.trainings == 3 for point in front if point.number != begun[-1])


@pytest.mark.slow
def test_an_export_says_what_its_figures_are(tmp_path: Path) -> None:
    small_search = search(tmp_path, backbone=str(save_tiny_model(tmp_path / "base")))
    front = small_search.run(trials=5, progress=False)
    point = max(front, key=lambda point: len(point.configuration))
    mean = point.values["accuracy"]
    for name, options, trainings in (
        ("kept", {}, "2, of which the validation figures are the means; this is number"),
        ("again", {"retrain": True}, "1 |"),
    ):
        point.export(tmp_path / name, **options)
        card = (tmp_path / name / "README.md").read_text()
        assert f"| trainings | {trainings}" in card
        first = next(iter(point.record.evaluation.by_seed.values()))["accuracy"]
        assert f"| accuracy | validation | {mean if name == 'kept' else first:.4f} |" in card


def _check_optuna(folder: Path, records: list[TrialRecord]) -> None:
    """A finished trial of the file has the values of its first training."""
    storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
    study = optuna.load_study(study_name="tiny", storage=storage)
    for trial, record in zip(study.trials, records, strict=True):
        if record.evaluation.status == "complete":
            first = next(iter(record.evaluation.each_training().values()))
            assert trial.values == [first[objective.name] for objective in OBJECTIVES]


def _check_mlflow(folder: Path, records: list[TrialRecord]) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    runs = {
        int(run.data.tags["autopeft.trial"]): run
        for run in client.search_runs([experiment.experiment_id], "tags.`autopeft.trial` LIKE '%'")
    }
    assert len(runs) == len(records)
    for record in records:
        run, evaluation = runs[record.number], record.evaluation
        assert run.data.metrics["accuracy"] == pytest.approx(evaluation.values["accuracy"])
        assert run.data.tags["autopeft.trainings"] == str(evaluation.trainings)
        if evaluation.by_seed:
            assert run.data.metrics["accuracy_std"] == pytest.approx(evaluation.values["accuracy_std"])
            assert "curve/accuracy/training_2" in run.data.metrics


@pytest.mark.slow
def test_an_interrupted_repeat_is_made_again(tmp_path: Path) -> None:
    uncut = search(tmp_path / "uncut").run(trials=6, progress=False)
    small_search = search(tmp_path / "cut")
    interrupts = iter((1, 2))
    due, count = next(interrupts), 0
    repeat = small_search.open().evaluator.train

    def interrupted(configuration: Configuration, seed: int, **options: object) -> object:
        nonlocal due, count
        count += "paused" in options
        if count == due and "paused" in options:
            due = next(interrupts, -1)
            raise KeyboardInterrupt
        return repeat(configuration, seed, **options)  # type: ignore[arg-type]

    small_search.open().evaluator.train = interrupted  # type: ignore[method-assign, assignment]
    for _ in range(3):
        front = small_search.run(trials=6, progress=False)
    assert due == -1
    assert outcomes(front.records) == outcomes(uncut.records)
    assert front.members == uncut.members
    assert not list(small_search.run(trials=6, progress=False).members ^ front.members)


def test_a_repeat_that_fails_is_a_result(tmp_path: Path) -> None:
    small_search = search(tmp_path)
    train = small_search.open().evaluator.train
    of_new_trials = {training_seed(small_search.seed, number) for number in range(5)}
    failing: list[int] = []

    def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
        if failing and module.training and type(getattr(output, "logits", None)) is Tensor:
            raise RuntimeError("broken on purpose")

    def second_fails(configuration: Configuration, seed: int, **options: object) -> object:
        failing[:] = [] if seed in of_new_trials else [seed]
        return train(configuration, seed, **options)  # type: ignore[arg-type]

    handle = small_search.open().backbone.model.register_forward_hook(hook)
    small_search.open().evaluator.train = second_fails  # type: ignore[method-assign, assignment]
    front = small_search.run(trials=5, progress=False)
    handle.remove()
    worst = small_search.task.trivial_score("accuracy", small_search.open().evaluator.data)
    repeated = [record.evaluation for record in front.records if record.evaluation.by_seed]
    assert repeated
    for evaluation in repeated:
        first = next(iter(evaluation.by_seed.values()))["accuracy"]
        assert evaluation.values["accuracy"] == pytest.approx((first + worst) / 2)
        assert evaluation.values[FAILED_SEEDS] == 1
    assert all(point.record.evaluation.trainings == 2 for point in front)


def test_a_search_with_other_seeds_is_another_one(tmp_path: Path) -> None:
    search(tmp_path, seeds=1).run(trials=2, progress=False)
    with pytest.raises(ValueError, match=r"search\.seeds: None there, '2' here"):
        search(tmp_path, seeds=2).run(trials=2, progress=False)
