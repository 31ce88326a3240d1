"""Runs of trials in a real MLflow store: what is written, what goes on, what is left alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import CurvePoint, TrialRecord
from autopeft.reporting.mlflow.run_content import (
    NOTE_TAG,
    PARENT_TAG,
    STUDY_TAG,
    trial_note,
    trial_params,
)
from autopeft.reporting.mlflow.run_writer import RunWriter
from autopeft.reporting.mlflow.store import checked_store, open_experiment
from tests.records import OBJECTIVES, synthetic_records

NOW = int(1000 * time.time())
RECORDS = synthetic_records(6)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    uri, artifacts = checked_store(f"sqlite:///{tmp_path_factory.mktemp('runs') / 'mlflow.db'}")
    return open_experiment(uri, artifacts, "runs")[0]


@pytest.fixture
def experiment(client: MlflowClient, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(client.create_experiment(request.node.name, artifact_location=tmp_path.as_uri()))


def writer(client: MlflowClient, experiment: str) -> RunWriter:
    tags = {PARENT_TAG: "parent", STUDY_TAG: "study"}
    return RunWriter(client, experiment, tags, OBJECTIVES, search_name="my search", backbone="org/model")


def runs(client: MlflowClient, experiment: str) -> list[Run]:
    return list(client.search_runs([experiment], order_by=["attributes.start_time ASC"]))


def adopted(
    client: MlflowClient, experiment: str, records: Sequence[TrialRecord]
) -> tuple[RunWriter, list[int], int]:
    later = writer(client, experiment)
    foreign = later.adopt(runs(client, experiment), records)
    return later, [record.number for record in later.behind(records)], foreign


def paused(record: TrialRecord, points: int) -> TrialRecord:
    curves = record.evaluation.curves[:points]
    at_rung = replace(record.evaluation, status="paused", reason="at a rung", curves=curves, fidelity=0.5)
    return replace(record, evaluation=at_rung)


def test_a_run_is_shown_as_running_and_ends_with_the_trial(client: MlflowClient, experiment: str) -> None:
    runs_of_trials = writer(client, experiment)
    runs_of_trials.start(1, RECORDS[1].evaluation.configuration, NOW - 5000)
    (run,) = runs(client, experiment)
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("RUNNING", NOW - 5000, None)
    runs_of_trials.finish(RECORDS[1], [1], NOW, {})
    runs_of_trials.finish(RECORDS[2], [1], NOW, {})  # never shown as running
    first, second = sorted(runs(client, experiment), key=lambda run: run.data.tags["autopeft.trial"])
    assert (first.info.run_id, first.info.status, first.info.end_time) == (run.info.run_id, "FINISHED", NOW)
    seconds = RECORDS[2].evaluation.cost.wall_seconds
    assert second.info.start_time == NOW - int(1000 * seconds)
    assert [run.data.tags["autopeft.pareto"] for run in (first, second)] == ["true", "false"]
    assert first.data.tags["mlflow.runColor"] != second.data.tags["mlflow.runColor"]
    for name in ("trainable_parameters", "peak_memory"):
        assert 10 ** first.data.metrics[f"log10_{name}"] == pytest.approx(RECORDS[1].evaluation.values[name])


def test_a_trial_that_goes_on_has_one_run_and_each_point_once(client: MlflowClient, experiment: str) -> None:
    record = RECORDS[3]
    first = writer(client, experiment)
    first.finish(paused(record, 2), [], NOW, {})
    assert runs(client, experiment)[0].info.status == "SCHEDULED"
    later, missing, foreign = adopted(client, experiment, [paused(record, 2)])
    assert (missing, foreign) == ([], 0)
    later.finish(record, [3], NOW + 1000, {})
    (run,) = runs(client, experiment)
    assert (run.info.status, run.data.tags["autopeft.pareto"]) == ("FINISHED", "true")
    name = record.evaluation.curves[0].metric
    history = client.get_metric_history(run.info.run_id, f"curve/{name}")
    expected = [(point.step, point.value) for point in record.evaluation.curves if point.metric == name]
    assert sorted((metric.step, metric.value) for metric in history) == expected


def test_a_run_that_is_out_of_date_is_written_on(client: MlflowClient, experiment: str) -> None:
    """The search was killed after the study had the trial's result and before MLflow had it."""
    record = RECORDS[3]
    writer(client, experiment).finish(paused(record, 2), [], NOW, {})
    later, missing, _ = adopted(client, experiment, [record])
    assert missing == [3]
    later.finish(record, [], NOW, {})
    assert [run.info.status for run in runs(client, experiment)] == ["FINISHED"]
    assert adopted(client, experiment, [record])[1] == []


def test_an_interrupted_trial_goes_on_in_its_run(client: MlflowClient, experiment: str) -> None:
    before = writer(client, experiment)
    before.start(4, RECORDS[4].evaluation.configuration, NOW)
    later, missing, foreign = adopted(client, experiment, [])
    assert (missing, foreign) == ([], 0)
    later.end_unfinished()
    (run,) = runs(client, experiment)
    assert run.info.status == "KILLED"
    again, *_ = adopted(client, experiment, [])
    other = replace(RECORDS[5], number=4)  # the number may come to another configuration
    again.start(4, other.evaluation.configuration, NOW)
    assert [found.info.status for found in runs(client, experiment)] == ["RUNNING"]
    again.finish(other, [], NOW, {})
    (found,) = runs(client, experiment)
    assert found.info.run_id == run.info.run_id
    assert found.data.params["configuration_key"] == other.evaluation.configuration.key
    assert found.info.run_name == "trial 4 · " + "+".join(other.evaluation.configuration.methods)


def test_finished_runs_that_are_not_the_studys_stay(client: MlflowClient, experiment: str) -> None:
    before = writer(client, experiment)
    for record in RECORDS[:3]:
        before.finish(record, [], NOW, {})
    kept = {run.info.run_id: run.data.to_dictionary() for run in runs(client, experiment)}
    others = [RECORDS[0], replace(RECORDS[5], number=1)]
    later, missing, foreign = adopted(client, experiment, others)
    assert (missing, foreign) == ([1], 2)
    later.finish(others[1], [], NOW, {})
    later.mark([0, 1])
    later.end_unfinished()
    after = {run.info.run_id: run.data.to_dictionary() for run in runs(client, experiment)}
    changed = {run_id for run_id, content in kept.items() if after[run_id] != content}
    assert len(after) == 4
    assert {kept[run_id]["tags"]["autopeft.trial"] for run_id in changed} == {"0"}  # on the front by now


def test_writing_a_trial_again_adds_nothing(client: MlflowClient, experiment: str) -> None:
    """What failed half way is written again."""
    curves = tuple(CurvePoint(metric="loss", step=step, value=1 / (1 + step)) for step in range(1500))
    record = replace(RECORDS[2], evaluation=replace(RECORDS[2].evaluation, curves=curves))
    runs_of_trials = writer(client, experiment)
    runs_of_trials.finish(record, [], NOW, {})
    runs_of_trials._points.clear()
    runs_of_trials.finish(record, [], NOW, {})
    (run,) = runs(client, experiment)
    assert len(client.get_metric_history(run.info.run_id, "curve/loss")) == 1500


def test_the_front_changes_tags_of_the_trials_concerned_alone(client: MlflowClient, experiment: str) -> None:
    runs_of_trials = writer(client, experiment)
    for record in RECORDS[:3]:
        runs_of_trials.finish(record, [0], NOW, {})
    for members in ([0, 1], [1, 2, 9], [2]):
        runs_of_trials.mark(members)
        found = {run.data.tags["autopeft.trial"]: run.data.tags for run in runs(client, experiment)}
        on_front = {number for number, tags in found.items() if tags["autopeft.pareto"] == "true"}
        assert on_front == {str(number) for number in members if number < 3}
        colours = {tags["mlflow.runColor"] for number, tags in found.items() if number in on_front}
        assert len(colours) == 1
        assert {tags["autopeft.status"] for tags in found.values()} == {"complete"}


def test_the_knee_has_a_colour_of_its_own(client: MlflowClient, experiment: str) -> None:
    first = writer(client, experiment)
    for record in RECORDS[:3]:
        first.finish(record, [0, 1], NOW, {}, 1)
    later, *_ = adopted(client, experiment, RECORDS[:3])
    for knee in (1, 0, 0):
        later.mark([0, 1], knee)
        found = {int(run.data.tags["autopeft.trial"]): run.data.tags for run in runs(client, experiment)}
        assert [number for number, tags in found.items() if tags["autopeft.knee"] == "true"] == [knee]
        assert {found[0]["autopeft.pareto"], found[1]["autopeft.pareto"]} == {"true"}
        assert len({tags["mlflow.runColor"] for tags in found.values()}) == 3


def test_runs_that_an_earlier_version_marked_are_marked_anew(client: MlflowClient, experiment: str) -> None:
    before = writer(client, experiment)
    for record in RECORDS[:2]:
        before.finish(record, [0, 1], NOW, {}, 0)
    for run in runs(client, experiment):
        client.delete_tag(run.info.run_id, "autopeft.knee")
    later, *_ = adopted(client, experiment, RECORDS[:2])
    later.mark([1], 1)
    found = {run.data.tags["autopeft.trial"]: run.data.tags for run in runs(client, experiment)}
    assert [found[number]["autopeft.pareto"] for number in "01"] == ["false", "true"]
    assert [found[number]["autopeft.knee"] for number in "01"] == ["false", "true"]


def test_a_trials_page_says_what_it_is_and_how_to_load_it(client: MlflowClient, experiment: str) -> None:
    record = RECORDS[3]
    writer(client, experiment).finish(record, [], NOW, {})
    (run,) = runs(client, experiment)
    note = run.data.tags[NOTE_TAG]
    assert f"**trial 3** (complete): accuracy {record.evaluation.values['accuracy']:.4f}" in note
    assert f"{record.evaluation.cost.wall_seconds:.1f} s" in note
    assert record.evaluation.configuration.grid() in note
    assert "as a picture below Artifacts, `configuration.svg`" in note
    assert "autopeft export 3 --search 'my search' --to adapters/3" in note
    assert "base = 'org/model'" in note
    assert "autopeft.load_adapter(base, 'adapters/3')" in note
    local = trial_note(record, OBJECTIVES, "my search", "MiniLM")
    assert "base = 'path/to/MiniLM'  # or its name on the hub" in local
    failed = replace(record, evaluation=replace(record.evaluation, status="failed", reason="nan at *step* 2"))
    note = trial_note(failed, OBJECTIVES, "my search", "org/model")
    assert r"(failed: nan at \*step\* 2)" in note
    assert "export" not in note


def test_parameters_say_what_sits_where() -> None:
    adapters = {
        Site(3, "query"): [Adapter("lora", 16)],
        Site(6, "query"): [Adapter("lora", 4)],
        **{Site(block, "query"): [Adapter("lora", 16)] for block in (7, 8, 9)},
        Site(0, "ffn_norm"): [Adapter("layernorm")],
    }
    configuration = Configuration(adapters, learning_rate=3e-4)
    record = TrialRecord(number=0, evaluation=replace(RECORDS[2].evaluation, configuration=configuration))
    params = trial_params(record)
    assert params["adapters/query"] == "lora(16) at 3, 7-9; lora(4) at 6"
    assert params["adapters/ffn_norm"] == "layernorm at 0"
    assert [name for name in params if name.startswith("adapters/")] == [
        "adapters/ffn_norm",
        "adapters/query",
    ]
