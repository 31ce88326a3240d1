"""The task of a user's own in the documentation, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autopeft
from autopeft import Adapter, Configuration, Site, Training
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.models.backbone import Backbone
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-task.md"


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Return pairs whose chosen text ends in w1 and whose rejected one ends in w2."""
    generator = np.random.default_rng(seed)
    starts = [" ".join(f"w{index}" for index in generator.integers(3, 90, 3)) for _ in range(count)]
    return [{"chosen": f"{start} w1", "rejected": f"{start} w2"} for start in starts]


@pytest.fixture
def task() -> Any:
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 50
    names: dict[str, Any] = {"__name__": "own_task"}
    exec(code, names)
    splits = {"train": pairs(48, 0), "validation": pairs(24, 1), "test": pairs(24, 2)}
    return names["Preferences"](splits)


def test_a_task_of_ones_own_learns(task: Any) -> None:
    backbone = Backbone.load(tiny_language_model("llama"), task.head, tiny_chat_tokenizer())
    evaluator = Evaluator(
        backbone,
        task,
        Training(epochs=4, batch_size=8, device="cpu"),
        resolve_objectives(("accuracy", "trainable_parameters", "peak_memory"), task.metrics),
    )
    configuration = Configuration(
        {Site(block, "ffn_down"): Adapter("lora", 4) for block in (0, 1)}, learning_rate=1e-2
    )
    trained = evaluator.train(configuration)
    evaluation = trained.evaluation
    assert evaluation.status == "complete", evaluation.reason
    assert evaluation.values["accuracy"] > 0.9
    assert evaluation.values["peak_memory"] > 0
    assert trained.state is not None
    assert evaluator.test(configuration, trained.state)["accuracy"] > 0.9
    again = evaluator.train(configuration)
    assert again.evaluation.values["accuracy"] == evaluation.values["accuracy"]
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in trained.state.items())  # type: ignore[index]


def test_a_search_over_a_task_of_ones_own_exports(task: Any, tmp_path: Path) -> None:
    model = tiny_language_model("llama")
    model.save_pretrained(tmp_path / "base")
    search = autopeft.Search(
        tmp_path / "base",
        task,
        tokenizer=tiny_chat_tokenizer(),
        training=Training(epochs=2, batch_size=8, device="cpu"),
        folder=tmp_path,
        tracking=None,
        seeds=1,
    )
    front = search.run(trials=5, progress=False)
    best = max(front, key=lambda point: point.values["trainable_parameters"])
    report = search.export(best.number, tmp_path / "adapter")
    assert report.max_logit_difference is not None
    assert report.max_logit_difference < 1e-3
