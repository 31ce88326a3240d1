"""What the search is compared with on a task that nothing was tuned on, and the figures told of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.untuned import COST, METRIC, RESULTS, hypervolumes
from tests.learnable import learnable_task


def points(**accuracies: float) -> dict[str, Any]:
    """Return points by their parameters, as in `p100`."""
    return {
        "points": [{METRIC: accuracy, COST: float(name[1:])} for name, accuracy in accuracies.items()],
    }


def test_the_sweep_is_valued_with_the_head_alone_and_without() -> None:
    run = {
        "parameters": [100, 10_000],
        "head alone": points(p100=2 / 3),
        "sweep": points(p1000=1.0),
        "autopeft": points(p100=2 / 3, p1000=1.0),
    }
    found = hypervolumes(run, learnable_task())
    assert found == pytest.approx(
        {"sweep": 0.5, "head alone": 0.5, "head alone and sweep": 0.75, "autopeft": 0.75}
    )


def test_what_is_told_is_what_the_file_has() -> None:
    record = json.loads((RESULTS / "untuned_dinov2_cifar10.json").read_text())
    medians = {name: f"{value:.3f}" for name, value in record["medians"].items()}
    benchmarks = (RESULTS.parent / "README.md").read_text()
    for name, told in (("sweep", "uniform LoRA"), ("head alone and sweep", "head alone and uniform LoRA")):
        assert f"| {told} | {medians[name]} |" in benchmarks
    for name in ("head alone", "autopeft"):
        assert f"| {name} | {medians[name]} |" in benchmarks
