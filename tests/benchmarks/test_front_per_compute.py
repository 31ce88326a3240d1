"""The yardstick: fronts at units of compute, from records that survive an interruption."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from autopeft import Search, Training
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import resolve_objectives
from autopeft.core.pareto import Axis, Values
from autopeft.search_spaces import Uniform
from benchmarks.front_per_compute import Comparison, Plan, run, show, train_again
from benchmarks.uniform_lora import uniform
from benchmarks.yardstick.methods import METHODS, OURS, PROTOCOL, RATES, SWEEP, Run, asked, goes_on, sweep
from benchmarks.yardstick.runs import Archive, Outcome, RunLog, front_at, is_done
from benchmarks.yardstick.tasks import TASKS, FrontTask
from tests.learnable import OBJECTIVES, TRAINING, learnable_task, learner

QUERY = Site(0, "query")


@dataclass(frozen=True, kw_only=True)
class TinyTask(FrontTask):
    config: str = ""
    model: str = ""
    data: str = ""

    def search(self, **options: Any) -> Search:
        settings: dict[str, Any] = {"objectives": OBJECTIVES, "training": TRAINING, "tracking": None}
        return Search(learner(), learnable_task(), **settings | options)


def lora(rank: int, rate: float = 1e-3) -> Configuration:
    return Configuration({QUERY: Adapter("lora", rank)}, learning_rate=rate)


def axes() -> tuple[Axis, ...]:
    metric, parameters, memory = resolve_objectives(OBJECTIVES, learnable_task().metrics)
    return (
        Axis(objective=metric, worst=0.0, best=1.0),
        Axis(objective=parameters, worst=1000.0, best=1.0),
        Axis(objective=memory, worst=1000.0, best=1.0),
    )


def values(accuracy: float, parameters: float, memory: float = 10.0) -> Values:
    return dict(zip(OBJECTIVES, (accuracy, parameters, memory), strict=True))


def test_a_front_has_what_was_known_by_then() -> None:
    lucky = Outcome(units=1.0, configuration=lora(1), values=values(0.9, 10))
    paused = Outcome(units=2.0, configuration=lora(2))
    other = Outcome(units=3.0, configuration=lora(4), values=values(0.5, 20))
    mean = Outcome(units=4.0, configuration=lora(1), values=values(0.4, 10))
    cut = Outcome(units=4.0, configuration=lora(1), values=values(0.3, 5), cut_from=lora(4))
    log = [lucky, paused, other, mean, cut]
    assert front_at(log, 0.5, axes(), 8) == []
    assert front_at(log, 3.5, axes(), 8) == [lucky]
    assert {member.key for member in front_at(log, 4.0, axes(), 8)} == {other.key, mean.key, cut.key}
    assert front_at(log, 4.0, axes(), 1) == [other]
    assert mean.key != cut.key


def test_of_equal_points_a_front_has_one() -> None:
    log = [Outcome(units=1.0, configuration=lora(1, rate), values=values(0.5, 10)) for rate in RATES]
    assert front_at(log, 1.0, axes(), 8) == log[:1]


def test_a_run_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a method 0.jsonl"
    log = RunLog(path, unit_seconds=10.0)
    log.spend(25.0)
    log.add(lora(2), values=values(0.5, 10), rungs=(values(0.4, 10),))
    log.add(lora(1), values=values(0.5, 5), cut_from=lora(2))
    with path.open("a") as file:
        file.write('{"units": 7.5, "confi')
    again = RunLog(path, unit_seconds=5.0)
    assert again.outcomes == log.outcomes
    again.spend(25.0)
    again.add()
    assert [outcome.units for outcome in RunLog(path, 1.0).outcomes] == [2.5, 2.5, 7.5]
    assert not is_done(again.outcomes, 8.0)
    again.end(8.0)
    assert is_done(RunLog(path, 1.0).outcomes, 8.0)
    assert len(again.tried) == 2


def test_what_was_trained_again_is_kept(tmp_path: Path) -> None:
    member = Outcome(units=1.0, configuration=lora(1), values=values(0.5, 10))
    Archive(tmp_path).add_test(member, 1000, values(0.4, 10))
    with (tmp_path / "tests.jsonl").open("a") as file:
        file.write('{"key": "cut o')
    Archive(tmp_path).add_test(member, 1001, values(0.6, 10))
    assert Archive(tmp_path).tests == {member.key: {1000: values(0.4, 10), 1001: values(0.6, 10)}}


def test_axes_are_those_of_the_first_machine(tmp_path: Path) -> None:
    Archive(tmp_path).add_task(axes(), 2.0)
    again = Archive(tmp_path)
    again.add_task(axes()[:2], 3.0)
    objectives = [axis.objective for axis in axes()]
    assert Archive(tmp_path).axes(objectives) == axes()
    assert [*Archive(tmp_path).unit_seconds.values()] == [3.0]


def test_a_method_that_is_planned_by_its_budget_begins_anew_with_another(tmp_path: Path) -> None:
    archive, short, long = Archive(tmp_path), Plan(units=(2.0, 4.0)), Plan(units=(40.0,))
    assert short.path(archive, PROTOCOL, 0) != long.path(archive, PROTOCOL, 0)
    assert short.path(archive, SWEEP, 0) == long.path(archive, SWEEP, 0)


def test_a_default_that_fails_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Run) -> None:
        raise ValueError("no such site")

    archive, plan = Archive(tmp_path), Plan(units=(1.0,))
    archive.add_task(axes(), 1.0)
    for method in (OURS, PROTOCOL):
        monkeypatch.setitem(METHODS, method, broken)
    assert run(PROTOCOL, TinyTask(), 0, archive, plan) == "left out: no such site"
    with pytest.raises(ValueError, match="no such site"):
        run(OURS, TinyTask(), 0, archive, plan)


def test_half_of_the_tasks_are_held_out() -> None:
    held_out = [task for task in TASKS.values() if task.is_held_out]
    assert len(held_out) == len(TASKS) / 2
    assert len({task.model for task in TASKS.values()}) >= 3


@pytest.mark.slow
def test_a_sweep_begins_with_what_is_most_usual(tmp_path: Path) -> None:
    backbone, log = learner(), RunLog(tmp_path / "log.jsonl", 1.0)
    run = Run(task=TinyTask(), seed=0, budget=9.0, axes=axes(), log=log, folder=tmp_path)
    tried: list[Configuration] = []
    while (found := sweep(run, backbone)) is not None:
        tried.append(found)
        log.add(found)
    assert tried[0] == Configuration(learning_rate=max(RATES))
    assert tried[1] == uniform(backbone, 8, 1e-3)
    assert set(tried[2:5]) == {
        uniform(backbone, 8, 3e-3),
        uniform(backbone, 2, 1e-3),
        uniform(backbone, 8, 1e-3, "query and value"),
    }
    assert len(set(tried)) == len(tried) == 1 + 7 * 4 * 4
    roles = {site.role for site, _ in uniform(backbone, 1, 1e-3, "MLP")}
    assert roles == {"ffn_up", "ffn_down"}
    assert {site.block for site, _ in uniform(backbone, 1, 1e-3, "top half")} == {1}


def test_one_of_three_goes_on_at_a_rung() -> None:
    others = [values(0.5, 10), values(0.4, 10), values(0.3, 10), values(0.3, 5)]
    assert goes_on(values(0.1, 10), [], axes())
    assert goes_on(values(0.6, 10), others, axes())
    assert not goes_on(values(0.45, 10), others[:3], axes())
    assert goes_on(values(0.45, 10), [*others[:1], *others[1:2] * 4], axes())


class StoppedError(Exception):
    """What kills a run."""


class ShortLog(RunLog):
    """Stops a run after so many outcomes of its file."""

    most = 0

    def add(self, configuration: Configuration | None = None, **known: Any) -> None:
        super().add(configuration, **known)
        if len(self.outcomes) == self.most:
            raise StoppedError


def test_what_a_sampler_is_told_follows_from_the_log(tmp_path: Path) -> None:
    path, backbone, space = (
        tmp_path / "log.jsonl",
        learner(),
        Uniform(sizes={"rank": (1, 8)}, learning_rate=(3e-4, 1e-2)),
    )
    tried: list[Configuration] = []
    for number in range(12):  # more than the first ten, which are drawn at random
        log = RunLog(path, 1.0)
        run = Run(task=TinyTask(), seed=0, budget=9.0, axes=axes(), log=log, folder=tmp_path)
        tried.append(asked(run, backbone, space=space, sampler="tpe"))
        log.add(tried[-1], values=None if number == 3 else values(number / 12, 10 + number))
        assert asked(run, backbone, space=space, sampler="tpe") != tried[-1]
    kept = Run(task=TinyTask(), seed=0, budget=9.0, axes=axes(), log=RunLog(path, 1.0), folder=tmp_path)
    assert asked(kept, backbone, space=space, sampler="tpe") == asked(
        run, backbone, space=space, sampler="tpe"
    )
    by_chance = asked(kept, backbone, space=space, sampler="tpe", random_share=1.0)
    assert by_chance != asked(kept, backbone, space=space, sampler="tpe")


@pytest.mark.parametrize("method", ["MO-ASHA", OURS])
@pytest.mark.slow
def test_an_interrupted_run_is_what_it_would_have_been(method: str, tmp_path: Path) -> None:
    def outcomes(name: str, *stops: int) -> list[tuple[Any, ...]]:
        for most in stops:
            log = ShortLog(tmp_path / f"{name}.jsonl", unit_seconds=1.0)
            log.most = most
            run = Run(
                task=TinyTask(), seed=0, budget=1e6, axes=axes(), log=log, folder=tmp_path / "runs" / name
            )
            with pytest.raises(StoppedError):
                METHODS[method](run)
        units = [outcome.units for outcome in log.outcomes]
        assert units == sorted(units)
        return [(outcome.key, outcome.values, outcome.rungs) for outcome in log.tried]

    assert outcomes("whole", 3) == outcomes("interrupted", 1, 3)


def test_a_cut_is_cut_from_a_fresh_training() -> None:
    task, whole = TinyTask(), lora(4, 1e-2)
    members = [
        Outcome(units=1.0, configuration=whole, values=values(0.5, 10)),
        Outcome(units=1.0, configuration=lora(1, 1e-2), values=values(0.5, 5), cut_from=whole),
    ]
    trained, cut = train_again(task, members, seed=1000)
    assert cut["trainable_parameters"] < trained["trainable_parameters"]
    assert cut["peak_memory"] == trained["peak_memory"]
    assert train_again(task, members, seed=1000) == [trained, cut]


def refused(*arguments: Any) -> NoReturn:
    raise AssertionError(f"It is done already: {arguments}")


@pytest.mark.slow
def test_methods_are_compared_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(methods=(SWEEP, OURS), seeds=1, units=(5.0, 20.0), fresh_seeds=1)
    with ThreadPoolExecutor(1) as pool:
        first = Comparison(TinyTask(), plan, Archive(tmp_path), pool).results()
        monkeypatch.setattr(pool, "submit", refused)
        again = Comparison(TinyTask(), plan, Archive(tmp_path), pool).results()
    assert again == first
    show("tiny", first, plan.units)
    assert f"{OURS} at 5 units, at least the sweep at 20" in capsys.readouterr().out
    for row in first["rows"]:
        assert 0 <= row["hypervolume"]["metric and parameters"]["20"]["median"] <= 1
        assert row["fronts_at_the_end"]["0"]


def test_longer_trainings_are_another_task() -> None:
    changed = TASKS["questions"].changed(["training.epochs=1"])
    assert isinstance(changed.search().training, Training)
    assert changed.search().training.epochs == 1
