"""MLflow's model registry."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from autopeft import Search
from autopeft.models.backbone import Backbone
from autopeft.tasks import MultiLabelClassification, Regression
from autopeft.tasks.text_task import TextTask
from tests.learnable import learnable_rows, learnable_task, tiny_search
from tests.task_cases import scored_rows, splits_of, tagged_rows
from tests.tiny_models import LABELS, tiny_headed, tiny_tokenizer

SCRIPT = """
import json, sys
import mlflow

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps(model.predict(json.loads(sys.argv[3])).values.tolist()))
"""
LENGTH = 12
LONG = " ".join(f"w{number % 90}" for number in range(200))  # the tiny model has 64 positions

pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")  # of MLflow, as it is imported


def registered(folder: Path, task: TextTask, rows: list[Any]) -> tuple[Search, int, list[Any]]:
    """Register the best of two trials; return search, trial and what a fresh process predicts for rows."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    backbone = Backbone.load(tiny_headed(task.head, "bert"), task.head, tiny_tokenizer())
    objectives = (task.metrics[0].name, "trainable_parameters")
    search = tiny_search(folder, backbone=backbone, task=task, objectives=objectives, tracking=uri)
    best = search.run(trials=2, progress=False).best()
    assert search.register(best.number, "reviews") == "models:/reviews/1"
    (model,) = MlflowClient(tracking_uri=uri).search_model_versions("name = 'reviews'")
    assert model.tags["autopeft.registered_trial"] == str(best.number)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, uri, "models:/reviews/1", json.dumps(rows)],
        capture_output=True,
        text=True,
        check=True,
    )
    return search, best.number, json.loads(done.stdout.splitlines()[-1])


def exported_logits(
    search: Search, number: int, folder: Path, rows: Sequence[tuple[str, ...]]
) -> tuple[Tensor, Mapping[int, str]]:
    """Return the logits of the exported model for rows cut as in training, and the names of its labels."""
    search.export(number, folder, target="merged")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for texts in rows:
        inputs = tokenizer(*texts, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0])
    return torch.stack(found), model.config.id2label


@pytest.mark.slow
def test_a_registered_model_labels_texts_as_the_exported_one(tmp_path: Path) -> None:
    texts = [*learnable_rows(3)["text"], LONG]
    search, number, rows = registered(tmp_path, learnable_task(max_length=LENGTH), texts)
    logits, names = exported_logits(search, number, tmp_path / "model", [(text,) for text in texts])
    assert len(names) == LABELS
    assert [label for label, _ in rows] == [names[int(label)] for label in logits.argmax(-1)]
    expected = logits.softmax(-1).max(-1).values.tolist()
    assert [score for _, score in rows] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_registered_model_has_every_label_s_probability(tmp_path: Path) -> None:
    texts = [*tagged_rows(2, 5)["text"], LONG]
    task = MultiLabelClassification(splits_of(tagged_rows), max_length=LENGTH)
    search, number, rows = registered(tmp_path, task, texts)
    logits, names = exported_logits(search, number, tmp_path / "model", [(text,) for text in texts])
    for row, scores in zip(rows, logits.sigmoid().tolist(), strict=True):
        expected = {names[label]: score for label, score in enumerate(scores)}
        assert {entry["label"]: entry["score"] for entry in row} == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_registered_model_reads_pairs(tmp_path: Path) -> None:
    pairs = [(LONG, "w5 w6"), ("w7", "w8 w9")]
    task = Regression(splits_of(scored_rows), text=("text", "other"), max_length=LENGTH)
    asked = [{"text": text, "text_pair": other} for text, other in pairs]
    search, number, rows = registered(tmp_path, task, asked)
    logits, _ = exported_logits(search, number, tmp_path / "model", pairs)
    assert [score for _, score in rows] == pytest.approx(logits[:, 0].tolist(), abs=1e-5)


def test_a_search_without_tracking_has_no_registry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tracking=None"):
        tiny_search(tmp_path).register(0, "reviews")
