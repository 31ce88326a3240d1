"""The benchmark of the surrogate: what a run knew at a moment, and what is to be foretold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from benchmarks.rivals.setting import Entry
from benchmarks.surrogate import final_scores, known_after, logs_of

FIRST, SECOND, THIRD = (
    Configuration({Site(0, role): Adapter("lora", 1)}) for role in ("query", "key", "value")
)
OTHER = Configuration({Site(0, "ffn"): Adapter("series", 4)})


def log(*trained: tuple[Configuration, float | None]) -> list[Entry]:
    return [
        Entry(configuration=configuration.to_dict(), score=score, parameters=1, cpu_seconds=float(place))
        for place, (configuration, score) in enumerate(trained)
    ]


def test_what_a_run_knew_has_the_scores_of_that_moment() -> None:
    trained = log((FIRST, 0.9), (SECOND, None), (FIRST, 0.6), (SECOND, 0.5), (FIRST, 0.4), (THIRD, 0.3))
    two, three = known_after(trained, (2, 3))
    assert two.configurations == [FIRST, SECOND]
    assert two.scores.tolist() == [0.6, 0.5]
    assert two.trainings.tolist() == [2, 1]
    assert three.scores.tolist() == [0.4, 0.5, 0.3]
    assert three.trainings.tolist() == [3, 1, 1]


def test_final_scores_are_means_over_runs_of_what_the_space_has() -> None:
    logs = {
        ("autopeft", 0): log((FIRST, 0.9), (FIRST, 0.5), (OTHER, 0.8)),
        ("a rival", 0): log((FIRST, 0.7), (SECOND, None)),
    }
    assert final_scores(logs) == {FIRST: pytest.approx(0.6)}


@pytest.mark.parametrize("name", ["runs.jsonl", "runs.jsonl.gz"])
def test_of_runs_that_begin_alike_the_longest_counts(tmp_path: Path, name: str) -> None:
    def line(dataset: str, trials: int, trained: Sequence[Entry]) -> str:
        run = {"method": "autopeft", "dataset": dataset, "seed": 0, "trials": trials}
        return json.dumps({**run, "log": [entry.to_dict() for entry in trained]}) + "\n"

    short, long = log((FIRST, 0.5)), log((FIRST, 0.5), (SECOND, 0.4))
    text = line("spam", 2, long) + line("spam", 1, short) + line("questions", 1, short)
    packed = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
    (tmp_path / name).write_bytes(packed)
    assert logs_of("spam", tmp_path / name) == {("autopeft", 0): long}
    assert logs_of("questions", tmp_path / name) == {("autopeft", 0): short}
