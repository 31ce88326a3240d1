"""The task of a user's own in the documentation, run as it stands there, from Python and from a file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from autopeft import Adapter, Configuration, Site, Training
from autopeft.cli import app
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import attach
from autopeft.models.backbone import Backbone
from autopeft.yaml_config import load_config
from tests.tiny_models import tiny_chat_tokenizer, tiny_language_model

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-task.md"
MODULE = "own_preferences"


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Return pairs whose chosen text ends in w1 and whose rejected one ends in w2."""
    generator = np.random.default_rng(seed)
    starts = [" ".join(f"w{index}" for index in generator.integers(3, 90, 3)) for _ in range(count)]
    return [{"chosen": f"{start} w1", "rejected": f"{start} w2"} for start in starts]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with the page's module, pairs and a base model."""
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 45
    (tmp_path / f"{MODULE}.py").write_text(code)
    for seed, (split, count) in enumerate({"train": 48, "validation": 24, "test": 24}.items()):
        lines = [json.dumps(pair) for pair in pairs(count, seed)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    tiny_language_model("llama").save_pretrained(tmp_path / "base")
    tiny_chat_tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return tmp_path


def test_a_task_of_ones_own_learns(place: Path) -> None:
    import own_preferences  # type: ignore[import-not-found]

    task: Any = own_preferences.Preferences(str(place))
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


def test_before_a_step_the_model_in_training_is_its_reference(place: Path) -> None:
    import own_preferences

    task: Any = own_preferences.Preferences(str(place))
    assert not task.is_one_pass
    backbone = Backbone.load(tiny_language_model("gpt2"), task.head, tiny_chat_tokenizer())
    objectives = resolve_objectives(("accuracy", "trainable_parameters"), task.metrics)
    evaluator = Evaluator(backbone, task, Training(device="cpu"), objectives)
    configuration = Configuration({Site(0, "ffn_down"): Adapter("lora", 4)})
    with evaluator.own_dropout(), attach(backbone, configuration):
        batch = evaluator.data.largest_batch()
        margins = task.margins(task.forward(backbone.model.train(), batch), batch)
    assert not margins.any()


@pytest.mark.slow
def test_a_task_of_ones_own_is_searched_and_exported_from_a_file(place: Path) -> None:
    settings = {
        "backbone": str(place / "base"),
        "task": {"type": f"{MODULE}:Preferences", "folder": str(place), "beta": 0.2},
        "training": {"epochs": 2, "batch_size": 8, "device": "cpu"},
        "folder": str(place / "runs"),
        "tracking": None,
        "seeds": 1,
    }
    (place / "preferences.yaml").write_text(yaml.safe_dump(settings))
    search = load_config(place / "preferences.yaml").search
    assert vars(search.task) == {"folder": str(place), "beta": 0.2}
    front = search.run(trials=5, progress=False)
    best = max(front, key=lambda point: point.values["trainable_parameters"])
    kept = yaml.safe_load((search.folder / "search.yaml").read_text())
    assert kept["task"] == settings["task"]
    arguments = ["export", str(best.number), "--to", str(place / "out"), "--folder", str(place / "runs")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Checked: loaded in a fresh process" in result.output
    assert (place / "out" / "adapter_model.safetensors").is_file()
