"""A search that pauses trials at rungs."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from autopeft import Search, SuccessiveHalving
from autopeft.core.configuration import Configuration
from autopeft.reporting.mlflow.run_content import TRIAL_TAG
from autopeft.search_spaces import Uniform
from autopeft.training.adapter_checkpoints import AdapterCheckpoints
from autopeft.training.settings import Training
from tests.learnable import outcomes, run, tiny_search


@pytest.mark.parametrize("rungs", [(), (0.0,), (1.0,), (0.5, 0.2), (0.2, 0.2), (float("nan"),)])
def test_rungs_are_increasing_shares(rungs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rungs are increasing shares"):
        SuccessiveHalving(rungs=rungs)


@pytest.mark.parametrize("factor", [1.0, 0.5, float("inf"), float("nan")])
def test_the_factor_is_above_one(factor: float) -> None:
    with pytest.raises(ValueError, match="reduction_factor must be a finite number above 1"):
        SuccessiveHalving(reduction_factor=factor)


TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true")


def halving_search(folder: Path, **settings: Any) -> Search:
    defaults: dict[str, Any] = {
        "halving": SuccessiveHalving(rungs=(1 / 3, 2 / 3), reduction_factor=2),
        "training": TRAINING,
        "space": Uniform(sizes={"rank": (1, 16)}, learning_rate=(1e-4, 3e-2)),
        "baselines": False,
    }
    return tiny_search(folder, **(defaults | settings))


@pytest.mark.slow
def test_a_search_trains_the_promising_on_and_leaves_the_rest_paused(tmp_path: Path) -> None:
    search = halving_search(tmp_path)
    front = run(search, 14)
    assert [record.number for record in front.records] == list(range(14))
    new = [record for record in front.records if record.duplicate_of is None]
    statuses = [record.evaluation.status for record in new]
    assert {"complete", "paused"} == set(statuses)
    assert sum(record.evaluation.cost.steps for record in new) < 18 * 0.8 * len(new)
    steps = {record.evaluation.cost.steps for record in new if record.evaluation.status == "paused"}
    assert steps <= {6, 12}
    assert all(point.record.evaluation.cost.steps == 18 for point in front)
    assert len(front) >= 1
    paused = {record.number for record in new if record.evaluation.status == "paused"}
    kept = {int(path.stem.removeprefix("trial-")) for path in (search.folder / "paused").iterdir()}
    assert kept == paused
    states = AdapterCheckpoints(search.folder / "adapters")
    for point in front:
        state = states.load(point.record)
        assert state is not None
        whole = halving_search(tmp_path / "alone", halving=None)
        trained = whole.open().evaluator.train(point.configuration, point.record.evaluation.seed)
        assert trained.state is not None
        assert all(torch.equal(state[name], tensor) for name, tensor in trained.state.items())


@pytest.mark.slow
def test_more_trials_go_on_with_what_was_paused(tmp_path: Path) -> None:
    whole = run(halving_search(tmp_path / "whole"), 8)
    run(halving_search(tmp_path / "parts"), 8)
    assert outcomes(run(halving_search(tmp_path / "parts"), 8).records) == outcomes(whole.records)
    more = run(halving_search(tmp_path / "parts"), 12)
    assert len(more.records) == 12


@pytest.mark.slow
def test_after_ctrl_c_a_paused_search_resumes(tmp_path: Path) -> None:
    whole = run(halving_search(tmp_path / "whole"), 8)
    cuts = 0
    for at in (3, 20, 33):
        search = halving_search(tmp_path / "cut")
        passes = 0

        def hook(module: torch.nn.Module, inputs: Any, output: Any, at: int = at) -> None:
            nonlocal passes
            if module.training and type(output.logits) is torch.Tensor and not output.logits.is_meta:
                passes += 1
                if passes == at:
                    signal.raise_signal(signal.SIGINT)

        handle = search.open().backbone.model.register_forward_hook(hook)
        cuts += len(run(search, 8).records) < 8
        handle.remove()
    assert cuts >= 2
    assert outcomes(run(halving_search(tmp_path / "cut"), 8).records) == outcomes(whole.records)


def test_what_failed_when_it_went_on_is_trained_anew(tmp_path: Path) -> None:
    halving = SuccessiveHalving(rungs=(1 / 3,), reduction_factor=4)
    search = halving_search(
        tmp_path, space=Uniform(sizes={"rank": (1, 4)}, learning_rate=1e-2), halving=halving
    )
    train, failed = search.open().evaluator.train, list[Configuration]()

    def failing_once(configuration: Configuration, *arguments: Any, **options: Any) -> Any:
        trained = train(configuration, *arguments, **options)
        if options.get("paused") is None or failed:
            return trained
        failed.append(configuration)
        return replace(trained, evaluation=replace(trained.evaluation, status="failed", reason="lost"))

    search.open().evaluator.train = failing_once  # type: ignore[method-assign]
    records = run(search, 8).records
    own = [record.evaluation for record in records if record.duplicate_of is None]
    again = [evaluation.status for evaluation in own if evaluation.configuration == failed[0]]
    assert again[0] == "failed"
    assert again[1:] == ["complete"]
    for record in records:
        if record.duplicate_of is not None:
            assert record.evaluation.status == records[record.duplicate_of].evaluation.status


@pytest.mark.slow
def test_optunas_own_study_is_valid(tmp_path: Path) -> None:
    search = halving_search(tmp_path)
    front = run(search, 8)
    storage = JournalStorage(JournalFileBackend(str(search.folder / "study.log")))
    study = optuna.load_study(study_name=search.name, storage=storage)
    states = {"complete": TrialState.COMPLETE, "paused": TrialState.RUNNING}
    for record, trial_ in zip(front.records, study.trials, strict=True):
        assert trial_.state == states[record.evaluation.status]
        if trial_.state == TrialState.COMPLETE:
            assert trial_.values == [
                record.evaluation.values[objective.name] for objective in front.objectives
            ]
    best = {trial.number for trial in study.best_trials}
    assert best >= front.members


@pytest.mark.slow
def test_mlflow_shows_paused_trials_as_scheduled(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        front = run(halving_search(tmp_path, tracking=uri), 6)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("autopeft")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`autopeft.trial` LIKE '%'")
    by_number = {int(mlflow_run.data.tags[TRIAL_TAG]): mlflow_run for mlflow_run in runs}
    assert len(runs) == len(by_number) == len(front.records)
    statuses = {"complete": "FINISHED", "paused": "SCHEDULED"}
    for record in front.records:
        found = by_number[record.number]
        assert found.info.status == statuses[record.evaluation.status]
        assert found.data.tags["autopeft.status"] == record.evaluation.status
        assert float(found.data.tags["autopeft.fidelity"]) == pytest.approx(
            record.evaluation.fidelity, abs=1e-3
        )
        history = client.get_metric_history(found.info.run_id, "curve/accuracy")
        expected = [curve.step for curve in record.evaluation.curves if curve.metric == "accuracy"]
        assert sorted(metric.step for metric in history) == expected


def test_rungs_must_fit_the_training(tmp_path: Path) -> None:
    search = halving_search(tmp_path, halving=SuccessiveHalving(rungs=(0.01,)))
    with pytest.raises(ValueError, match="expected increasing steps"):
        search.validate()


def test_times_can_be_objectives_of_a_search_that_pauses(tmp_path: Path) -> None:
    objectives = ("accuracy", "training_seconds", "inference_latency")
    front = run(halving_search(tmp_path, objectives=objectives), 5)
    assert len(front) >= 1
