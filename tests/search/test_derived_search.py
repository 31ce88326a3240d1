"""Points derived from trials in a search: on its front, kept, replicated, exported, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from autopeft import ParetoFront, Search, SuccessiveHalving
from autopeft.core.evaluation import TrialRecord
from autopeft.evaluation.trial_runner import TrialRunner
from autopeft.optimization.study_store import load_study
from autopeft.reporting.mlflow.run_content import TRIAL_TAG
from autopeft.search_spaces import Uniform
from autopeft.training.settings import Training
from tests.learnable import outcomes, tiny_search
from tests.studies import optunas

TRAINING = Training(epochs=3, batch_size=8, device="cpu", precision="32-true")


def search(folder: Path, **settings: Any) -> Search:
    defaults: dict[str, Any] = {
        "space": Uniform(sizes={"rank": (4, 16)}, learning_rate=(5e-3, 3e-2)),
        "objectives": ("accuracy", "trainable_parameters", "peak_memory"),
        "training": TRAINING,
        "derive": True,
    }
    return tiny_search(folder, **(defaults | settings))


def of_trials(front: ParetoFront) -> list[TrialRecord]:
    return [record for record in front.records if record.derived_from is None]


def cuts_of(front: ParetoFront) -> list[TrialRecord]:
    return [record for record in front.records if record.derived_from is not None]


@pytest.mark.slow
def test_trials_are_the_same_and_the_front_has_more(tmp_path: Path) -> None:
    with_cuts = search(tmp_path / "with").run(trials=5, progress=False)
    without = search(tmp_path / "without", derive=False).run(trials=5, progress=False)
    assert outcomes(of_trials(with_cuts)) == outcomes(without.records)
    cuts = cuts_of(with_cuts)
    assert {cut.number for cut in cuts} & with_cuts.members
    for cut in cuts:
        parent = with_cuts.trial(cut.number % 100_000).record
        assert cut.derived_from == parent.number
        assert cut.evaluation.values["peak_memory"] == parent.evaluation.values["peak_memory"]
    assert with_cuts.hypervolume > without.hypervolume
    _, stored = load_study(tmp_path / "with" / "tiny")
    assert stored == of_trials(with_cuts)
    assert len(optunas(tmp_path / "with" / "tiny").trials) == 5, "a cut is no proposal"
    frame = with_cuts.to_frame(all_trials=True).set_index("trial")
    assert frame["derived_from"].dropna().to_dict() == {cut.number: cut.derived_from for cut in cuts}


@pytest.mark.slow
def test_cuts_are_replicated_with_their_trials(tmp_path: Path) -> None:
    found = search(tmp_path, seeds=2, tracking=f"sqlite:///{tmp_path}/mlflow.db")
    front = found.run(trials=4, progress=False)
    assert all(point.record.evaluation.trainings == 2 for point in front)
    cut = next(point for point in front if point.record.derived_from is not None)
    parent = front.trial(cut.record.derived_from or 0).record.evaluation
    assert [*cut.record.evaluation.by_seed] == [*parent.by_seed]
    assert 0 < cut.record.evaluation.cost.wall_seconds < parent.cost.wall_seconds
    for retrain in (False, True):
        report = cut.export(tmp_path / f"adapter {retrain}", retrain=retrain)
        assert report.max_logit_difference is not None
        card = (report.folder / "README.md").read_text()
        assert f"| cut from | trial {cut.record.derived_from} |" in card
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs(["1"], f"tags.`{TRIAL_TAG}` = '{cut.number}'")
    assert [run.data.tags["autopeft.derived_from"] for run in runs] == [str(cut.record.derived_from)]
    again = found.run(trials=4, progress=False)
    assert outcomes(again.records) == outcomes(front.records)


@pytest.mark.slow
def test_a_killed_search_neither_loses_nor_doubles_a_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"halving": SuccessiveHalving(rungs=(1 / 3,)), "seeds": 2}
    whole = search(tmp_path / "whole", **options).run(trials=5, progress=False)
    run, jobs = TrialRunner.run, 0

    def killed(runner: TrialRunner, job: Any) -> TrialRecord:
        """Train, write what a job leaves, and end before its record is told, every third time."""
        nonlocal jobs
        record, jobs = run(runner, job), jobs + 1
        if jobs % 3 == 0:
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(TrialRunner, "run", killed)
    for _ in range(20):
        cut_short = search(tmp_path / "killed", **options)
        front = cut_short.run(trials=5, progress=False)
        if not cut_short.interrupted:
            break
    assert jobs > 3
    assert outcomes(front.records) == outcomes(whole.records)
    assert cuts_of(front)
    names = {path.name for path in (cut_short.folder / "adapters").iterdir()}
    assert names >= {f"trial-{point.number:05d}.safetensors" for point in front}


def test_a_search_of_before_reads_its_records(tmp_path: Path) -> None:
    record = of_trials(search(tmp_path).run(trials=1, progress=False))[0]
    old = record.to_dict()
    del old["derived_from"], old["evaluation"]["derived"]
    assert TrialRecord.from_dict(json.loads(json.dumps(old))).evaluation.derived == ()
