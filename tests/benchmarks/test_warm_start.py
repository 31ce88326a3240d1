"""What the benchmark of warm starts makes of trainings, and which configurations it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from benchmarks.warm_start import (
    INHERITED,
    LONGER,
    RANDOM,
    Measured,
    Outcome,
    Trial,
    chosen,
    correlations,
)
from tests.learnable import tiny_evaluator


def outcome(arm: str, place: int, seed: int, *thirds: float) -> Outcome:
    return Outcome(trial=Trial(arm, place, seed), thirds=thirds, test=0.0, cpu_seconds=1.0)


def test_early_sights_are_compared_with_the_other_seeds_whole_trainings() -> None:
    measured = Measured(points=[])
    for seed in (0, 1):
        for place in range(4):
            right, wrong = place / 10, -place / 10
            measured.outcomes += [
                outcome(RANDOM, place, seed, wrong, 0.5, right),
                outcome(INHERITED, place, seed, right, right, wrong),
                outcome(LONGER, place, seed, 0.0, 0.0, 0.0),
            ]
    assert correlations(measured) == {
        f"{RANDOM}, after 1/3": pytest.approx(-1),
        f"{RANDOM}, after 2/3": 0.0,
        f"{RANDOM}, after 3/3": pytest.approx(1),
        f"{INHERITED}, after 1/3": pytest.approx(1),
        f"{INHERITED}, after 2/3": pytest.approx(1),
        f"{INHERITED}, after 3/3": pytest.approx(-1),
    }


def test_most_configurations_are_from_the_fronts_of_runs(tmp_path: Path) -> None:
    def entry(rank: int, score: float, parameters: int) -> dict[str, object]:
        configuration = (
            Configuration({Site(0, "query"): Adapter("lora", rank)}) if rank else Configuration({})
        )
        return {
            "configuration": configuration.to_dict(),
            "score": score,
            "parameters": parameters,
            "cpu_seconds": float(rank),
        }

    log = [entry(0, 0.3, 1), entry(1, 0.5, 10), entry(2, 0.6, 20), entry(3, 0.7, 30), entry(4, 0.4, 40)]
    run = {"method": "autopeft", "dataset": "questions", "seed": 0, "trials": 5, "log": log}
    others = {**run, "dataset": "spam", "log": [entry(9, 0.9, 1)]}
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(run) + "\n" + json.dumps(others) + "\n")
    evaluator = tiny_evaluator(objectives=("accuracy", "trainable_parameters"))
    found = chosen("questions", evaluator, path, 4)
    sizes = [adapter.size for configuration in found for _, adapter in configuration]
    assert sorted(sizes[:3]) == [1, 2, 3]
    assert sizes[3:] == [4]
