"""Profile: every second counts once, where it was spent, and nothing changes while it is watched."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from autopeft.core import profiling
from autopeft.core.profiling import SECTIONS, Profile, TimeSpan, current_profile, section
from autopeft.reporting.search_report import PROFILE_FOLDER
from autopeft.training.lightning_profiler import section_of, training_profiler
from autopeft.training.settings import Training
from tests.learnable import outcomes, tiny_evaluator, tiny_search
from tests.tiny_models import everywhere


class Clock:
    """Wall time, and processor time that goes at half its speed."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(profiling, "time", made)
    return made


def seconds(profile: Profile) -> dict[str, float]:
    return {name: span.seconds for name, span in profile.spans.items() if span.calls}


def test_a_section_has_the_time_that_none_inside_it_takes(clock: Clock) -> None:
    @section("count")
    def count() -> None:
        clock.now += 8

    with Profile() as profile:
        clock.now += 1
        with section("attach"):
            clock.now += 2
            count()
            clock.now += 4
        count()
        clock.now += 16
    assert seconds(profile) == {"other": 17, "attach": 6, "count": 16}
    assert profile.spans["count"] == TimeSpan(16, 8, 2)
    clock.now += 32
    assert seconds(profile)["other"] == 17


def test_a_running_profile_can_be_brought_up_to_now(clock: Clock) -> None:
    with Profile() as profile, section("log"):
        clock.now += 3
        profile.count()
        assert profile.spans["log"] == TimeSpan(3, 1.5, 1)


def test_recursion_and_exceptions_leave_the_right_section(clock: Clock) -> None:
    @section("ask")
    def down(levels: int) -> None:
        clock.now += 1
        if levels:
            down(levels - 1)
        raise KeyError(levels)

    with Profile() as profile:
        with pytest.raises(KeyError):
            down(2)
        clock.now += 10
    assert seconds(profile) == {"other": 10, "ask": 3}


def test_what_was_left_open_ends_with_what_is_around_it(clock: Clock) -> None:
    with Profile() as profile:
        outer = profile.enter("trainer")
        profile.enter("data")
        clock.now += 1
        profile.leave(outer)
        clock.now += 2
    assert seconds(profile) == {"other": 2, "trainer": 0, "data": 1}


def test_without_a_profile_sections_do_nothing() -> None:
    assert current_profile.get() is None
    with section("ask"):
        pass
    assert training_profiler() is None


def test_another_thread_counts_nowhere(clock: Clock) -> None:
    found = []

    def work() -> None:
        found.append(current_profile.get())
        with section("count"):
            clock.now += 5

    with Profile() as profile:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [None]
    assert seconds(profile) == {"other": 5}


def test_names_are_checked_and_profiles_do_not_nest() -> None:
    with pytest.raises(AssertionError, match="asking"), section("asking"):
        pass
    with Profile(), pytest.raises(RuntimeError, match="being profiled already"), Profile():
        pass
    assert current_profile.get() is None


def test_lightnings_actions_are_those_of_the_installed_version() -> None:
    evaluator = tiny_evaluator(training=Training(epochs=2, batch_size=8, device="cpu", precision="32-true"))
    configuration = everywhere(evaluator.backbone, "lora")
    with Profile() as profile:
        evaluator.train(configuration)
        assert len(profile._stack) == 1
    steps = 2 * 48 // 8
    calls = {name: span.calls for name, span in profile.spans.items()}
    assert calls["forward"] == calls["backward"] == steps
    # The step, gradients clipped and freed, and the learning rate.
    assert calls["optimizer"] == 4 * steps
    assert calls["data"] >= steps
    assert calls["evaluate"] > 0
    assert calls["set-up"] == calls["count"] == 1
    assert calls["attach"] == 2
    spent = {name for name, span in profile.spans.items() if span.seconds > 0}
    assert {"trainer", "forward", "backward", "optimizer", "evaluate", "data", "set-up"} <= spent


def test_a_training_that_fails_leaves_no_section_open() -> None:
    evaluator = tiny_evaluator()

    def fail(module: Any, inputs: Any, output: Any) -> None:
        if module.training and type(output.logits) is torch.Tensor and not output.logits.is_meta:
            raise RuntimeError("the wire came loose")

    handle = evaluator.backbone.model.register_forward_hook(fail)
    logging.getLogger("autopeft.evaluation.run").setLevel(logging.ERROR)
    try:
        with Profile() as profile:
            evaluation = evaluator.evaluate(everywhere(evaluator.backbone, "lora"))
            assert len(profile._stack) == 1
    finally:
        handle.remove()
        logging.getLogger("autopeft.evaluation.run").setLevel(logging.NOTSET)
    assert evaluation.status == "failed"


@pytest.mark.parametrize(
    ("action", "name"),
    [
        ("[Strategy]ResidentStrategy.training_step", "forward"),
        ("[LightningModule]FineTuning.optimizer_step", "optimizer"),
        ("[Callback]BestWeights.on_validation_end", "evaluate"),
        ("run_training_batch", "trainer"),
        ("[Callback]Throughput.on_train_batch_end", None),
    ],
)
def test_actions_belong_to_sections(action: str, name: str | None) -> None:
    assert section_of(action) == name


@pytest.mark.slow
def test_a_profiled_search_is_the_same_search_and_says_where_its_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_search(tmp_path / "plain")
    front = plain.run(trials=3, progress=False)
    assert not (plain.folder / PROFILE_FOLDER).exists()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    search = tiny_search(tmp_path / "profiled", tracking=uri)
    profiled = search.run(trials=3, profile=True)
    assert outcomes(profiled.records) == outcomes(front.records)
    shown = capsys.readouterr().out
    assert "3 trainings" in shown
    kept = json.loads((search.folder / PROFILE_FOLDER / "profile.json").read_text())
    assert kept["sections"].keys() == SECTIONS.keys()
    assert kept["trainings"] == 3
    assert kept["seconds"] == pytest.approx(sum(span["seconds"] for span in kept["sections"].values()))
    assert kept["sections"]["forward"]["calls"] == 3 * 48 // 8
    assert kept["sections"]["rehearse"]["calls"] == 3  # a step, an export, the sampler
    assert kept["sections"]["record"]["seconds"] > 0
    assert kept["sections"]["log"]["seconds"] > 0
    assert kept["tracking"]["calls"] > 3
    for name in ("load", "tokenise", "ask", "attach", "count", "other"):
        assert kept["sections"][name]["seconds"] > 0
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'autopeft'")
    (parent,) = client.search_runs([experiment.experiment_id], "params.`search.seed` = '0'")
    logged = {artifact.path for artifact in client.list_artifacts(parent.info.run_id, PROFILE_FOLDER)}
    assert logged == {"profile/profile.json", "profile/profile.txt"}


def test_a_call_that_goes_on_is_profiled_by_itself(tmp_path: Path) -> None:
    tiny_search(tmp_path).run(trials=2, progress=False)
    search = tiny_search(tmp_path)
    search.run(trials=3, progress=False, profile=True)
    kept = json.loads((search.folder / PROFILE_FOLDER / "profile.json").read_text())
    assert kept["trainings"] == 1
    assert kept["tracking"] is None
    assert kept["sections"]["forward"]["calls"] == 48 // 8
    assert "forward" in (search.folder / PROFILE_FOLDER / "profile.txt").read_text()
