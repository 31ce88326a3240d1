"""A search over many families at once: every point of its front is exported and computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from autopeft.yaml_config import build_config
from tests.learnable import OBJECTIVES, TRAINING, learnable_task, run, tiny_search

SETTINGS = Path(__file__).parents[2] / "configs" / "families.yaml"


@pytest.mark.slow
def test_every_point_of_a_front_over_many_families_is_exported(tmp_path: Path) -> None:
    space = replace(build_config(yaml.safe_load(SETTINGS.read_text())).search.space, learning_rate=1e-2)
    training, task = replace(TRAINING, epochs=6), learnable_task(rows=96)  # in which more than a head learns
    settings = {"training": training, "task": task, "objectives": OBJECTIVES, "sampler": "random"}
    front = run(search := tiny_search(tmp_path, space=space, **settings), 16)
    evaluations = [record.evaluation for record in front.records]
    assert all(evaluation.status == "complete" for evaluation in evaluations), evaluations
    used = {method for evaluation in evaluations for method in evaluation.configuration.methods}
    assert len(used) >= 12
    assert len(front) >= 2
    for point in front:
        report = search.export(point.number, tmp_path / f"out-{point.number}")
        assert report.max_logit_difference is not None
