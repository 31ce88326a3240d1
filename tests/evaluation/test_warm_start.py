"""How the largest LoRA is trained: under which constraints, with what measured, and where that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import Cost
from autopeft.core.objectives import resolve_constraints
from autopeft.evaluation.largest_lora import largest_lora
from autopeft.evaluation.warm_start import WarmStarts
from tests.learnable import tiny_evaluator
from tests.search.test_warm_start import SPACE


def test_a_bound_that_the_largest_lora_breaks_binds_trials_alone(tmp_path: Path) -> None:
    evaluator = tiny_evaluator(
        objectives=("accuracy", "trainable_parameters"), constraints={"trainable_parameters": 600}
    )
    weights = WarmStarts(evaluator, SPACE, tmp_path)
    largest = weights.largest()
    assert largest is not None
    assert weights.obstacle is None
    assert largest.configuration == largest_lora(SPACE, evaluator.backbone)
    assert evaluator.evaluate(largest.configuration).status == "infeasible"


def test_a_bound_on_memory_leaves_its_upper_sites(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluator = tiny_evaluator()
    whole = largest_lora(SPACE, evaluator.backbone)
    assert whole is not None
    top = Configuration(
        {site: adapters for site, adapters in whole.adapters.items() if site.block == 1},
        learning_rate=whole.learning_rate,
    )
    needed = evaluator.costs(top)["peak_memory"]
    assert needed < evaluator.costs(whole)["peak_memory"]

    def weights(bound: float) -> WarmStarts:
        constraints = resolve_constraints({"peak_memory": bound}, evaluator.task.metrics)
        evaluator.constraints = constraints
        return WarmStarts(evaluator, SPACE, tmp_path / f"{bound:.0f}")

    kept = weights(needed).largest()
    assert kept is not None
    assert kept.configuration == top
    nothing = weights(1024)
    assert nothing.largest() is None
    assert nothing.obstacle == "LoRA of the largest rank breaks the bound on peak memory at every site"
    assert f"There are no warm starts: {nothing.obstacle}." in caplog.text


def test_nothing_is_measured_of_it_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = ("accuracy", "trainable_parameters", "peak_memory", "inference_latency")
    evaluator, measured = tiny_evaluator(objectives=objectives), []
    for name in ("latency", "measured_at_end", "attached_costs"):
        original = getattr(evaluator, name)

        def measure(*given: Any, name: str = name, original: Any = original) -> Any:
            measured.append(name)
            return original(*given)

        monkeypatch.setattr(evaluator, name, measure)
    largest = WarmStarts(evaluator, SPACE, tmp_path).largest()
    assert largest is not None
    assert measured == []
    evaluator.evaluate(largest.configuration)
    assert measured == ["attached_costs", "latency", "measured_at_end"]


def test_what_the_backbone_cannot_carry_is_an_obstacle_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond = Configuration({Site(99, "query"): Adapter("lora", 4)})
    monkeypatch.setattr("autopeft.evaluation.warm_start.largest_lora", lambda *_: beyond)
    weights = WarmStarts(tiny_evaluator(), SPACE, tmp_path)
    assert weights.for_new_trial(beyond) is None
    assert "99.query" in str(weights.obstacle)
    assert weights.cost == Cost()
