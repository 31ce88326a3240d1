"""The benchmark of what a front costs: its mathematics, and the hand-written loop it compares with."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.objectives import Objective, resolve_objectives
from benchmarks.rivals.comparison import (
    FRESH_SEEDS,
    Archive,
    Comparison,
    key_of,
    members_at,
    moments,
    reached,
)
from benchmarks.rivals.setting import Entry, Setting
from benchmarks.search_cost import ratio

METRIC, COST = resolve_objectives(("accuracy", "trainable_parameters"), (Objective.score("accuracy"),))


def entry(rank: int, score: float | None, parameters: int, seconds: float) -> Entry:
    configuration = Configuration({Site(0, "query"): Adapter("lora", rank)})
    return Entry(
        configuration=configuration.to_dict(), score=score, parameters=parameters, cpu_seconds=seconds
    )


def test_a_front_has_who_was_done_and_is_beaten_by_nobody() -> None:
    log = [
        entry(1, 0.5, 100, 10.0),
        entry(2, None, 50, 20.0),
        entry(3, 0.4, 200, 30.0),
        entry(4, 0.6, 100, 40.0),
    ]
    assert members_at(log, 9.0, METRIC, COST) == []
    assert members_at(log, 10.0, METRIC, COST) == log[:1]
    assert members_at(log, 39.0, METRIC, COST) == log[:1]
    assert members_at(log, 40.0, METRIC, COST) == log[3:]


def test_of_one_that_was_trained_again_the_mean_counts() -> None:
    lucky, other, mean = entry(1, 0.9, 100, 10.0), entry(2, 0.5, 100, 20.0), entry(1, 0.45, 100, 30.0)
    log = [lucky, other, mean]
    assert members_at(log, 20.0, METRIC, COST) == [lucky]
    assert members_at(log, 30.0, METRIC, COST) == [other]


def test_a_candidate_is_trained_again_as_the_search_trained_it_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    cold = entry(1, 0.5, 100, 10.0)
    warm = replace(entry(2, 0.6, 200, 20.0), warm_start=True)
    archive = Archive(tmp_path)
    for as_trained, keys in (
        (False, [key_of(cold), key_of(warm)]),
        (True, [key_of(cold), key_of(warm) + ", inherited"]),
    ):
        comparison = Comparison("questions", {("ours", 0): [cold, warm]}, archive, as_trained=as_trained)
        assert sorted(comparison.needed()) == sorted(keys)


def test_moments_are_log_spaced_over_all_runs() -> None:
    found = moments([[entry(1, 0.5, 1, 10.0)], [entry(2, 0.5, 1, 1000.0)]])
    assert found[0] == pytest.approx(10.0)
    assert found[-1] == pytest.approx(1000.0)
    ratios = [later / earlier for earlier, later in pairwise(found)]
    assert max(ratios) == pytest.approx(min(ratios))


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.1, 1.0), (0.2, 1.0), (0.3, math.sqrt(10.0)), (0.4, 10.0), (0.5, None)],
)
def test_a_level_is_reached_between_moments_on_a_log_scale(level: float, expected: float | None) -> None:
    found = reached([0.2, 0.4, 0.3], [1.0, 10.0, 100.0], level)
    assert found == (None if expected is None else pytest.approx(expected))


def test_the_ratio_is_a_bound_where_the_rival_never_gets_there() -> None:
    def row(seconds: float | None) -> dict[str, object]:
        return {"seconds_to": {"95%": seconds}, "cpu_seconds": 900.0}

    own = row(50.0)
    assert ratio(row(500.0), own, "95%") == "10.0×"
    assert ratio(row(None), own, "95%") == "> 18.0×"
    assert ratio(own, row(None), "95%") == "–"


def test_what_a_rival_has_at_its_end_is_a_level(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    quick, slow = entry(1, 0.9, 3_000, 10.0), entry(2, 0.6, 3_000, 80.0)
    for candidate, test in ((quick, 0.8), (slow, 0.6)):
        for index, seed in enumerate(FRESH_SEEDS):  # the mean over them counts
            archive.add_training("questions", key_of(candidate), seed, test + 0.05 * (-1) ** index)
    assert len(FRESH_SEEDS) % 2 == 0
    rows = Comparison("questions", {("ours", 0): [quick], ("rival", 0): [slow]}, archive).rows(["rival"])
    ours, rival = rows
    assert list(ours["seconds_to"]) == ["90%", "95%", "99%", "rival: its end"]
    assert list(ours["seconds_to"].values()) == pytest.approx([10.0] * 4)
    assert rival["seconds_to"]["95%"] is None
    assert rival["seconds_to"]["rival: its end"] == pytest.approx(80.0)
    assert ours["share_at_end"] == 1.0
    assert ratio(rival, ours, "95%") == "> 8.0×"


def test_what_is_done_is_kept(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "new")
    setting = Setting(dataset="questions", seed=3, trials=2)
    log = [entry(1, 0.5, 100, 10.0), entry(2, None, 50, 20.0)]
    archive.add_run("a method", setting, log)
    archive.add_training("questions", key_of(log[0]), 1000, 0.75)
    again = Archive(tmp_path / "new")
    assert again.runs == {("a method", "questions", 3, 2): log}
    assert again.trainings == {("questions", key_of(log[0]), 1000): 0.75}
